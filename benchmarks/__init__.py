"""What `taut bench` and `taut tune` do: our kernels beside their peers, whole engines, and the tiles of a GPU.

operations   the operations, their shapes and grids, the bytes and products that each needs     (plain Python)
results      what was measured, as files that can be read, compared and plotted                 (plain Python)
tables       results for people
plots        results as pictures                                                                (matplotlib)
tasks        an operation with its tensors, as a call that can be timed                         (torch)
peers        the kernels of others that are installed here
timing       the time of a call, and what the hardware can do                                   (a GPU)
kernels      a grid of shapes through all of them
engines      whole engines in processes of their own
tuning       the choice of tiles
"""


class BenchmarkError(ValueError):
    """Something that the user can put right; the message says what was asked and what to do."""
