"""Serving a packaged model over HTTP."""
