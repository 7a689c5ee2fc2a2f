"""Writing new keys and values into a paged cache; the contract is in `taut.common_kernels.kernels`."""
