"""From importance to thresholds: sketches, their exchange, the search."""
