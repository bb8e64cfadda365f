"""The promotion gate: checks that a model must pass to become champion."""
