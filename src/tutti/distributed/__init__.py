"""Rows that processes share, process groups, and sharded tensors."""
