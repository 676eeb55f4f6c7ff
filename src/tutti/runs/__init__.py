"""A run's folder, its summary, and what a run prints."""
