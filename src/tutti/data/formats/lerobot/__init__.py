"""LeRobot v3.0 data sets: reader and writer."""
