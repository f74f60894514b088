"""What is trained on what: the recipe, and the ways to start it."""
