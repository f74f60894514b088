"""What can be known of a recipe without GPUs and without ranks: all that is wrong with it, and what it would do."""
