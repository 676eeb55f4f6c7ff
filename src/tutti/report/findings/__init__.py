"""Sentences that the report draws from the records of a run."""
