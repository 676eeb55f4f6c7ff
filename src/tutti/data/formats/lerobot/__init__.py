"""LeRobotDataset: v2.0 to v3 read, v3.0 written; here the names that its features go by."""

VIEW = "observation.images."
"""What a camera's name begins with."""
STATE, ACTION = "observation.state", "action"
ENVIRONMENT_STATE = "observation.environment_state"
"""All that the simulator knew: kept for probes, never read by a training."""
