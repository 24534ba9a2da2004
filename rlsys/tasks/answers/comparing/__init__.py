"""Comparison of values."""
