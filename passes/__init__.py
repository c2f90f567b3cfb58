"""Rewrite passes, one a file."""
