"""Tables in JSONL and Parquet files: schemas, reading and writing; rows of data sets."""
