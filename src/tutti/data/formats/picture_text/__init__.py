"""Picture-text pairs: a folder of pictures with a table of texts, Parquet files, tar shards."""
