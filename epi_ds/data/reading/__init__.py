"""Files of rows, read as they were written: what a container holds, and in which row, whatever its name ends in."""
