"""Importance, sketches, thresholds, masks and their schedule: everything that knows no DeepSpeed."""
