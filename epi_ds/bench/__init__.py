"""What the README's figures are measured with. Imports everything below, is imported by the command line only."""
