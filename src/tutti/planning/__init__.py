"""What a training will need before anything is run: memory, FLOPs, time, traffic (`tutti plan`)."""
