"""Saving, resuming, forking and pruning checkpoints."""
