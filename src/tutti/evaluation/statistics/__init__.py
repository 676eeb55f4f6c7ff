"""Intervals and tests for success rates, and two arms compared over training seeds."""
