"""Objectives: features and a batch become one loss term each, and the terms one unified loss."""
