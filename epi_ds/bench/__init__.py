"""What docs/measured is measured with. Imports everything below, is imported by the command line only."""
