"""The DeepSpeed engine, its rollback, shared errors and files."""
