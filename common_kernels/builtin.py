"""The providers that come with this package, as data."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from taut.common_kernels.kernels import CONTRACT
from taut.common_kernels.problem import OPERATIONS, Capability
from taut.common_kernels.provider import KernelProvider, hookimpl
from taut.common_kernels.step import DECODE_QUERIES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from taut.common_kernels.kernels import Kernels
    from taut.common_kernels.problem import Operation


def _load_reference() -> Kernels:
    from taut.common_kernels import reference

    return reference


REFERENCE = KernelProvider(
    name="reference",
    summary="plain torch on any device: the oracle, and the choice where there is no GPU",
    priority=0,
    capabilities=tuple(Capability(cast("Operation", operation)) for operation in OPERATIONS),
    load=_load_reference,
    requires=("torch",),
    # It waits for the device in every call: right everywhere, fit to serve only where there is no device to wait for.
    automatic_on=("cpu",),
    graphs=False,
    contract=CONTRACT,
)


def _load_portable() -> Kernels:
    from taut.common_kernels import portable

    return portable


GPUS = ("sm_80+", "gfx942", "gfx950")
NUMBERS = frozenset({"bfloat16", "float16", "float32"})
HALVES = frozenset({"bfloat16", "float16"})
FLOAT8 = frozenset({"float8_e4m3fn"})
# One power of two from 16, or the sum of two.
DENSE_SIZES = frozenset({16, 32, 48, 64, 80, 96, 128, 144, 160, 192, 256})

TRITON = KernelProvider(
    name="triton",
    summary="Triton kernels for NVIDIA (sm_80 and later) and AMD (CDNA3 and later)",
    priority=10,
    capabilities=(
        Capability("paged_attention", GPUS, NUMBERS, NUMBERS | FLOAT8, head_sizes=DENSE_SIZES, value_sizes=DENSE_SIZES),
        Capability("ragged_attention", GPUS, NUMBERS, NUMBERS, head_sizes=DENSE_SIZES, value_sizes=DENSE_SIZES),
        Capability(
            "mla_decode",
            GPUS,
            HALVES,
            HALVES | FLOAT8,
            head_sizes=frozenset({192, 320, 576}),
            value_sizes=frozenset({128, 256, 512}),
            max_q_heads=128,
            features=frozenset({"causal", "non_causal", "lse"}),
        ),
        Capability("store_kv", GPUS, NUMBERS, NUMBERS | FLOAT8),
        Capability("store_mla_kv", GPUS, NUMBERS, NUMBERS | FLOAT8),
        Capability("merge", GPUS, NUMBERS),
    ),
    load=_load_portable,
    requires=("torch", "triton"),
    query_limits=(DECODE_QUERIES,),
    contract=CONTRACT,
)


def _load_hopper() -> Kernels:
    from taut.common_kernels import hopper

    return cast("Kernels", hopper)  # it has what its capabilities name


def _missing_of_gluon() -> Sequence[str]:
    from taut.common_kernels.gluon_features import missing

    return missing()


SM_90 = ("sm_90",)
# Head sizes of keys and values that the Hopper kernels have instances for.
HOPPER_SIZES = ((64, 64), (128, 128), (192, 128), (256, 256))

HOPPER = KernelProvider(
    name="hopper",
    summary="Gluon kernels for NVIDIA Hopper (sm_90)",
    priority=20,
    capabilities=(
        Capability(
            "mla_decode",
            SM_90,
            frozenset({"bfloat16"}),
            frozenset({"bfloat16"}) | FLOAT8,
            head_sizes=frozenset({576}),
            value_sizes=frozenset({512}),
            max_q_heads=128,
            features=frozenset({"causal", "non_causal", "lse"}),
        ),
        Capability(
            "mla_decode",
            SM_90,
            frozenset({"float16"}),
            frozenset({"float16"}),
            head_sizes=frozenset({576}),
            value_sizes=frozenset({512}),
            max_q_heads=128,
            features=frozenset({"causal", "non_causal", "lse"}),
        ),
        # Queries, keys and values are of one dtype.
        *(
            Capability(
                operation,
                SM_90,
                frozenset({dtype}),
                frozenset({dtype}),
                head_sizes=frozenset({head_size}),
                value_sizes=frozenset({value_size}),
            )
            for operation in cast("tuple[Operation, ...]", ("paged_attention", "ragged_attention"))
            for dtype in sorted(HALVES)
            for head_size, value_size in HOPPER_SIZES
        ),
        Capability("store_kv", SM_90, NUMBERS, NUMBERS | FLOAT8),
        Capability("store_mla_kv", SM_90, NUMBERS, NUMBERS | FLOAT8),
        Capability("merge", SM_90, NUMBERS),
    ),
    load=_load_hopper,
    requires=("torch", "triton"),
    automatic_on=SM_90,
    query_limits=(DECODE_QUERIES,),
    probe=_missing_of_gluon,
    contract=CONTRACT,
)


@hookimpl
def taut_kernels() -> Sequence[KernelProvider]:
    """The built-in providers."""
    return [HOPPER, TRITON, REFERENCE]
