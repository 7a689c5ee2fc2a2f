"""Attention over a whole from attention over its parts; the contract is in `taut.common_kernels.kernels`."""
