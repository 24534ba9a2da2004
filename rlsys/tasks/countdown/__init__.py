"""Reach a target number with given numbers."""
