"""Optimizers, learning-rate schedules, clipping and the moving average of weights."""
