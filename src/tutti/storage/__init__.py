"""Files that a kill leaves old or new, and the checkpoint folder: for training and serving alike."""
