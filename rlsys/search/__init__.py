"""Finished trees: reading, writing, extraction and statistics, without an engine."""
