"""Records demonstrations of a suite into a LeRobot data set."""
