"""Attention over a paged cache, and over keys that lie side by side; the contract is in `common_kernels.kernels`."""
