"""A pull towards the weights that knew what must be kept: how strong it is, and what is kept of those weights."""
