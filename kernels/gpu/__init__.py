"""The operations as Triton kernels; see `epi_ds.kernels.reference` for what each of them means."""
