"""Streaming access to image archives (zip, tar, tar.gz) and folders, with strict checks."""
