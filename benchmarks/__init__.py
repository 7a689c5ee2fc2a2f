"""Our kernels beside their peers, in one process, and what the hardware can do: `python -m benchmarks.mla_decode`."""
