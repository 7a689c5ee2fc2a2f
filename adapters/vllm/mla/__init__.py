"""vLLM's multi-head latent attention (MLA) on our kernels.

vLLM splits a step into rows that decode and rows that prefill, and hands each part over on its own.

| module | what it holds |
| --- | --- |
| `backend` | what vLLM asks of a backend |
| `layer` | one layer's call, for either part |
| `prefill` | the second part in a form in which vLLM's own code calls it |
| `builder` | one step: a schedule for the first part, the prefill for the second |
| `problems` | what a layer asks of our kernels |
"""
