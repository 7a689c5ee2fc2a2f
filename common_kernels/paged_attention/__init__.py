"""Attention over a paged cache, and over keys that lie side by side; the contract is in `taut.common_kernels.kernels`."""
