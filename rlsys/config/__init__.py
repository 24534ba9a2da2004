"""The config: schema, files, comparison, and what it means for stages and engines."""
