"""What attention needs, and nothing of an engine.

| module | what it holds |
| --- | --- |
| `problem` | what is asked for and what a provider can do, both as data |
| `providers` | who provides kernels, and the choice among them; its parts are `provider` and `registry` |
| `paging`, `step` | the paged cache as strided views, and one engine step as data |
| `paged_attention`, `mla_decode`, `store_kv`, `merge` | the operations; `reference.py` in each is its oracle |
| `schedule`, `scratch`, `workspace` | equal shares of a step's work, decided on the device; room for splits |
| `tiles` | tile tables per GPU, as data, looked up by pure functions |
| `warm_up` | the steps that adapters run idle, so that nothing compiles while an engine serves |
| `reference`, `portable`, `builtin` | the providers that come with this package |
"""
