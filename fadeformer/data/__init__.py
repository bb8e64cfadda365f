"""Data: fetching, decoding, validation manifest, splits and preprocessed arrays."""
