"""What a step of an engine does in its attention that no result needs, seen inside the engine's own process.

| module | what it holds |
| --- | --- |
| `operations` | what one operation of torch's makes a device do: fill, copy, wait, launch, allocate |
| `trace` | the first source: every operation of metadata and layers, with the line of code that asked for it |
| `device` | the second source: one pass of torch's profiler, what the device really did |
| `watch` | how the two are put around an engine's steps, whatever the engine |
| `padding` | what a backend leaves in rows that have no work |
| `floor` | what a step must move at least, and what is made of a launch's grid; arithmetic alone |
| `records` | what a run leaves behind, as data; the schema of the JSON |
| `work` | what an engine's process is asked to do, and what both of them need to do it |
| `run_vllm`, `run_sglang` | the engine's process: starts the engine, gives it work, writes the record |
| `process` | the same seen from outside: started, followed, and never left behind |
| `verdict` | findings out of records, and what fails |
| `report` | runs and what was made of them, as `--json` prints them and a later command reads them |
| `shown` | what is shown of a report, in words and tables, whatever draws them |
| `page`, `picture` | a report as one HTML page, a step as SVG, on that page and by itself |

The command `taut audit` imports these; nothing else does.
"""
