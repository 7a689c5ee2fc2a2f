"""Runs kernels written in Gluon for Hopper on a CPU, and tries to break them.

    import gluon_emulator
    gluon_emulator.install()            # before anything imports the kernel's module; needs TRITON_INTERPRET=1
    from kernels import my_kernel       # its @gluon.jit functions are now run by Python
    with gluon_emulator.seeded(3):      # another seed, another order of everything that is not ordered
        my_kernel[(4,)](x, out, descriptor, len(x), BLOCK=64, num_warps=4)

`install` puts modules of its own in place of `triton.experimental.gluon` and those below it. A kernel's own Triton
kernels (a schedule, a merge) run beside it under Triton's interpreter. `replace("name", function)` calls a Python
function on emulated tensors (`values.Tensor`) instead of the jitted function of that name: for inline assembly. An
error names the line of the kernel, the program, and the seed that shows it again. `without(file, line)` runs a kernel
without one statement, to see whether that would be noticed.

What is modelled
* Numbers: Triton's promotion and rounding, integers of 32 and 64 bits that wrap, division toward zero, NaN that
  `max` drops; loads and stores held against the elements of the very tensor that was given; what a mask leaves out is
  undefined (NaN, large integers).
* What the compiler is told of pointers, `multiple_of` and `max_contiguous`, must hold.
* Layouts, as far as the language itself compares them: operands of one computation agree, `x[:, None]` needs the right
  SliceLayout, a layout has the partition's warps, those of a product are what the instruction takes. Where the compiler
  would infer a layout (reshape, permute, join, split) anything goes: compiling is what checks those.
* Shared memory: where each element lies is Triton's own answer, swizzles included, so a view of other bytes reads what
  they hold; it begins undefined, and there are 227 KiB of it.
* mbarriers: arrivals, expected and delivered bytes, phases; too many of either, a phase unfinished at the end and a
  partition that waits for ever are errors.
* TMA and cp.async: the destination is undefined from the issue until the end, which comes at a random time; the source
  is read at the issue or at the end.
* Warpgroup products: an asynchronous one reads shared memory at its issue or as late as its wait, and its accumulator
  cannot be read before.
* Proxies: what has been written by ordinary stores (or cp.async) is read by a product only past a
  fence_async_shared of the writer or of the reader.
* Programmatic launch: with `launch_pdl` a partition must wait for the kernel ahead (griddepcontrol.wait, its own or of
  the program before its partitions) before it touches global memory or lets the next kernel start.
* Partitions of warp_specialize run in a random order, one at a time, switching where they synchronise; some seeds let
  one outrun the others, or let copies end only when nobody can go on.

What is not
* Threads and warps of a partition: it runs as one. Barriers between its own threads, which the compiler puts in, are
  taken for granted; so is that a cp.async arrival with increment_count is not overtaken.
* That barriers must be seen to be made: the fence behind `mbarrier.init` may be missing.
* Programs that wait for one another, clusters, multicast, named barriers: no effect or an error.
* Speed, registers, bank conflicts; the order in which a product sums.
"""

from __future__ import annotations

from gluon_emulator.jit import Settings, replace, seeded, without
from gluon_emulator.modules import install
from gluon_emulator.values import EmulationError

__all__ = ["EmulationError", "Settings", "install", "replace", "seeded", "without"]
