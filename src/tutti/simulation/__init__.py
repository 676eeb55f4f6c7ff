"""Simulators as a source of demonstrations and as a judge of policies: Meta-World on MuJoCo."""
