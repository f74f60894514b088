"""Policies beside the paper's: controls of a comparison, and other methods that hold entries; one file each."""
