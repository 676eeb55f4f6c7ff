"""RLDS episodes in TFDS version folders, read without TensorFlow."""
