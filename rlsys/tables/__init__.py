"""Tables in JSONL and Parquet files: reading, writing, and where a data set comes from."""
