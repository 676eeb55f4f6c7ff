"""LeRobotDataset v3.0: reader, writer, metadata, statistics and videos."""
