"""Data sets by source: published sets, the synthetic phantom and users' own images."""
