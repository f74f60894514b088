"""Reading tools over the files of a run: neither an engine nor a trainer is needed."""
