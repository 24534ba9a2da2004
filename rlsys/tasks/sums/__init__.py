"""Add several numbers, one after the other."""
