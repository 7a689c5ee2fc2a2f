"""MLA attention in its absorbed form; the contract is in `taut.common_kernels.kernels`."""
