"""Whether training will work on these machines, before it is tried: what `epi-ds doctor` finds."""
