"""C++ implementations of the operations, compiled on first use. They give the bits of `epi_ds.kernels.reference`."""
