"""Input and output: atomic writes, JSON Lines, chunked tables and number formatting."""
