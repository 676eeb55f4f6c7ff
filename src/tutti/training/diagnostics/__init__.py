"""Measurements during training: gradients per term and module, noise scale, dead units."""
