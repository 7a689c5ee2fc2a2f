"""vLLM's dense attention (MHA, GQA, MQA) on our kernels.

| module | what it holds |
| --- | --- |
| `backend` | what vLLM asks of a backend |
| `layer` | one layer's call |
| `builder` | one step, as all layers of a cache group share it |
| `problems` | what a layer asks of our kernels |
"""
