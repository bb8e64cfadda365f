"""Verified, resumable downloads and their lock file."""
