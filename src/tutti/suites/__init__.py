"""Simulators behind one protocol: environments, the tasks of a suite, worker processes."""
