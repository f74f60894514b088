"""Saving and loading that need the engine."""
