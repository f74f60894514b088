"""Recipes, stages, the trainer glue and evaluation."""
