"""Intervals and comparisons of success rates and paired scores."""
