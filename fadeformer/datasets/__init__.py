"""Data sets: where each comes from, what is known of it, and the manifest that all of them end in."""
