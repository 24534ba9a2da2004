"""Finished trees: reading, writing, extraction and statistics. No engine is needed."""
