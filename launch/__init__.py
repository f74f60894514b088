"""Starting ranks, and what has to be in place before the first one starts."""
