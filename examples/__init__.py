"""Runnable examples; each one uses only the public product."""
