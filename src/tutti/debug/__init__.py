"""Looking at a run from outside: the doctor before a training, the probes after it."""
