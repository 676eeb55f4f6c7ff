"""Recorded robot episodes become batches: formats, frame cache, windows, normalisation, text, loading."""
