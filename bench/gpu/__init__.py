"""Whole steps on a GPU."""
