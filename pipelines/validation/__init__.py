"""Data validation: the great-expectations suite and its page."""
