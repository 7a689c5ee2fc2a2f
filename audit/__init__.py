"""What a step of an engine does in its attention that no result needs, seen inside the engine's own process.

| module | what it holds |
| --- | --- |
| `operations` | what one operation of torch's makes a device do: fill, copy, wait, launch, allocate |
| `trace` | the first source: every operation of metadata and layers, with the line of code that asked for it |
| `device` | the second source: one pass of torch's profiler, what the device really did |
| `floor` | what a step must move at least, and what is made of a launch's grid; arithmetic alone |
| `records` | what a run leaves behind, as data; the schema of the JSON |
| `verdict` | findings out of records, two backends side by side, what fails |
| `watch` | how the two sources are put around an engine's steps, whatever the engine |
| `run_vllm`, `run_sglang` | the engine's process: starts the engine, gives it work, writes the record |
| `page` | the record as one HTML page |

The command `taut audit` imports these; nothing else does.
"""
