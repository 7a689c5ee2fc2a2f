"""SGLang's own attention tests, unedited, against our backend: one command, and a report.

    python tests/conformance/sglang_kit.py                    every case below, with our backend
    python tests/conformance/sglang_kit.py --backend triton   the same with a backend of SGLang's own, to compare
    python tests/conformance/sglang_kit.py --only mla         the cases whose name says so
    python tests/conformance/sglang_kit.py --processes 8      shared out over so many, side by side

The tests travel in SGLang's wheel, `sglang.test.kits.attention_unittest`, from 0.5.13 on: functions that build a small
layer over a pool, let a backend that its registry knows run it, and hold the outcome against plain attention. They take
the device as an argument: without a GPU they run on the CPU, there with our Triton kernels under Triton's interpreter,
since SGLang's runners capture what they run and our reference cannot be captured.

A case counts only if our backend attended in it, which compiles what the case needs and warms up nothing else. What is
wrong is said as soon as it is known. Exit status 0: every case passed, was refused with the sentence that is listed for
it, or is not there in this release for a reason that is listed.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
import unittest
from collections import Counter
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich
import torch
from rich.table import Table

from taut.common_kernels.builtin import TRITON
from taut.common_kernels.providers import KernelProvider, hookimpl, registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

ON_GPU = torch.cuda.is_available()
if not ON_GPU:  # before SGLang is imported, and Triton with it
    os.environ["TRITON_INTERPRET"] = "1"
DEVICE = "cuda" if ON_GPU else "cpu"
KIT = "sglang.test.kits.attention_unittest"
LAYOUTS = ("shuffled_pages", "contiguous", "interleaved_pages", "non_monotonic_extend")
LATENT = {"kv_lora_rank": 128, "qk_rope_head_dim": 64}
NEIGHBOURS = 8  # cases that one process runs one after the other, since they need the same kernels

# What we do not serve, and the sentence that says so before a number is computed.
REFUSED = {
    "tree": r"verifies a tree of drafts",
}
# Why a case may be missing: what the kit says when it skips it, or what its release has not.
KNOWN_SKIPS = {
    r"no piecewise graphs": "captured pieces of another kind: this release has none",
}


@dataclass(frozen=True)
class Case:
    """One case of the kit.

    Args:
        group: what of attention it is about.
        name: its own.
        run: runs it; takes the `unittest.TestCase` through which the kit skips.
        refused: the key of `REFUSED` where refusing is right; "" elsewhere.
    """

    group: str
    name: str
    run: Callable[[unittest.TestCase], None]
    refused: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of one case.

    Args:
        group: what of attention it is about.
        name: its own.
        outcome: passed, refused, failed or skipped.
        why: the reason of a skip or a refusal, the message of a failure.
        calls: how often our backend attended in it.
        seconds: how long it took.
    """

    group: str
    name: str
    outcome: str
    why: str
    calls: int
    seconds: float

    @property
    def is_wrong(self) -> bool:
        """Whether it failed, or was skipped for a reason that nobody has listed."""
        return self.outcome == "failed" or (self.outcome == "skipped" and known_skip(self.why) is None)


def known_skip(why: str) -> str | None:
    """Why a skip is right; None if it is not known to be."""
    return next((said for pattern, said in KNOWN_SKIPS.items() if re.search(pattern, why)), None)


class Kit:
    """The kit's modules, and its cases for one backend.

    Args:
        backend: its name in SGLang's registry.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.dense = import_module(f"{KIT}.attention_methods.dense_attention")
        self.mla = import_module(f"{KIT}.attention_methods.mla_attention")
        self.captured = import_module(f"{KIT}.runner_modes.cuda_graph_decode_runner")
        self.pieces = import_module(f"{KIT}.runner_modes.split_op_runner")
        self.verify = import_module(f"{KIT}.runner_modes.speculative_target_verify_runner")
        self.extend = import_module(f"{KIT}.runner_modes.speculative_draft_extend_runner")
        self.mode = import_module("sglang.srt.model_executor.forward_batch_info").ForwardMode
        # The kit wants to know of every backend how many keys a window holds: ours counts the query's own in addition.
        if backend not in self.dense._SWA_DECODE_MIN_SEQ_LEN_WINDOW:
            self.dense._SWA_DECODE_EXTEND_WINDOW |= {backend}

    def dense_case(self, name: str, mode: str, *, window: int | None = None, **shape: Any) -> Any:
        """A case of dense attention with 4 query heads, pages of 16 and whatever `shape` says otherwise."""
        usual = {"num_heads": 4, "num_kv_heads": 4, "page_size": 16}
        return self.dense.DenseAttentionCase(
            name=name, backend=self.backend, forward_mode=self.mode[mode], sliding_window_size=window, **(usual | shape)
        )

    def mla_case(self, name: str, mode: str, **shape: Any) -> Any:
        """A case of MLA, likewise."""
        return self.mla.MLAAttentionCase(
            name=name, backend=self.backend, forward_mode=self.mode[mode], num_heads=4, page_size=16, **shape
        )

    def cases(self) -> Iterator[Case]:
        """Every case, in the order of the report."""
        yield from self.plain()
        yield from self.captured_decode()
        yield from self.split_op()
        yield from self.verification()
        yield from self.draft_extend()
        if ON_GPU:
            yield from self.draft_steps()

    def plain(self) -> Iterator[Case]:
        """Dense, windowed and latent attention, uncaptured, over each layout of pages."""
        windowed = (
            *self.dense.make_swa_no_prefix_input_config_cases(self.backend),
            *self.dense.make_swa_prefix_input_config_cases(self.backend),
            self.dense_case("swa_decode_window_edges", "DECODE", window=4, prefix_lens=(2, 3, 4, 5, 17)),
            self.dense_case("swa_decode_gqa_page_1", "DECODE", window=4, num_kv_heads=2, page_size=1, prefix_lens=(9,)),
        )
        for group, run, cases in (
            ("dense", self.dense.run_dense_attention_case, self.dense.make_dense_cases(self.backend)),
            ("sliding window", self.dense.run_dense_attention_case, windowed),
            ("MLA", self.mla.run_mla_attention_case, self.mla.make_mla_cases(self.backend)),
        ):
            for case in cases:
                for layout in LAYOUTS:
                    if layout != "non_monotonic_extend" or not case.forward_mode.is_decode():
                        yield self.case(group, f"{case.name} {layout}", run, case, loc_layout=layout)
            # The interpreter's bfloat16 is not a GPU's.
            for dtype in (torch.bfloat16, torch.float32)[0 if ON_GPU else 1 :]:
                name = f"{cases[0].name} {str(dtype).removeprefix('torch.')}"
                yield self.case(group, name, run, cases[0], dtype=dtype)
        # The kit's own latent vectors have no rope part; with one, keys are wider than values.
        for case in self.mla.make_mla_cases(self.backend):
            name = f"{case.name} rank 128 rope 64"
            yield self.case("MLA", name, self.mla.run_mla_attention_case, case, **LATENT)
        for size in (64, 128):
            for case in self.dense.make_dense_attention_config_cases(self.backend):
                run = self.dense.run_dense_attention_case
                yield self.case("dense", f"{case.name} head {size}", run, case, head_dim=size, hidden_size=4 * size)

    def captured_decode(self) -> Iterator[Case]:
        """The metadata of a captured decode step, replayed with other rows, padding among them."""
        dense, mla = self.captured.run_dense_cuda_graph_decode_case, self.captured.run_mla_cuda_graph_decode_case
        for name, more in (
            ("mha_decode", {}),
            ("gqa_decode", {"num_kv_heads": 2}),
            ("mha_decode_page_1", {"page_size": 1}),
            ("swa_decode", {"window": 4}),
        ):
            yield self.case(
                "captured decode", name, dense, self.dense_case(name, "DECODE", prefix_lens=(14, 15, 16), **more)
            )
        for rows in ((14, 15, 16), (7,)):
            name = f"mla_decode_{len(rows)}_rows"
            case = self.mla_case(name, "DECODE", prefix_lens=rows)
            yield self.case("captured decode", name, mla, case)
            yield self.case("captured decode", f"{name} rank 128 rope 64", mla, case, **LATENT)

    def split_op(self) -> Iterator[Case]:
        """Prompts whose forward is captured in pieces, attention between them, tokens padded."""
        for breakable in (True, False):
            kind = "breakable" if breakable else "piecewise"
            for name, padded, more in (
                ("extend_ragged", 32, {"prefix_lens": (0, 8, 16), "extend_lens": (15, 8, 1)}),
                ("extend_cross_page", 4, {"prefix_lens": (15,), "extend_lens": (2,)}),
                ("extend_unpadded", None, {"prefix_lens": (0, 3), "extend_lens": (5, 4)}),
            ):
                dense, mla = self.pieces.run_dense_split_op_extend_case, self.pieces.run_mla_split_op_extend_case
                how = {"breakable": breakable, "static_num_tokens": padded}
                case = self.dense_case(f"mha_{name}", "EXTEND", **more)
                yield self.case("split-op extend", f"{case.name} {kind}", dense, case, **how)
                case = self.dense_case(f"swa_gqa_{name}", "EXTEND", window=4, num_kv_heads=2, **more)
                yield self.case("split-op extend", f"{case.name} {kind}", dense, case, **how)
                case = self.mla_case(f"mla_{name}", "EXTEND", **more)
                yield self.case("split-op extend", f"{case.name} {kind}", mla, case, **how)
                yield self.case("split-op extend", f"{case.name} rank 128 rope 64 {kind}", mla, case, **how, **LATENT)

    def verification(self) -> Iterator[Case]:
        """Drafts to be verified: chains of every kind; trees, which we refuse."""
        lengths = {"prefix_lens": (4, 7), "extend_lens": (3, 3)}
        for kind in ("eagle", "frozen_kv_mtp", "dflash", "ngram"):
            refused = "tree" if kind == "ngram" else ""  # n-grams: their first tokens may branch whatever the breadth
            for how in ("uncaptured", "captured"):
                suffix = "_cuda_graph" if how == "captured" else ""
                dense = getattr(self.verify, f"run_dense_spec_verify{suffix}_case")
                mla = getattr(self.verify, f"run_mla_eagle_verify{suffix}_case")
                for run, case in (
                    (dense, self.dense_case(f"mha_{kind}_chain", "TARGET_VERIFY", **lengths)),
                    (
                        dense,
                        self.dense_case(f"swa_gqa_{kind}_chain", "TARGET_VERIFY", window=4, num_kv_heads=2, **lengths),
                    ),
                    (mla, self.mla_case(f"mla_{kind}_chain", "TARGET_VERIFY", **lengths)),
                ):
                    yield self.case(
                        "verification", f"{case.name} {how}", run, case, refused=refused, topk=1, spec_kind=kind
                    )
        for how, run in (("uncaptured", self.verify.run_mla_eagle_verify_case), ("captured", mla)):
            case = self.mla_case("mla_eagle_chain rank 128 rope 64", "TARGET_VERIFY", **lengths)
            yield self.case("verification", f"{case.name} {how}", run, case, topk=1, spec_kind="eagle", **LATENT)
        case = self.dense_case("mha_eagle_tree", "TARGET_VERIFY", **lengths)
        run = self.verify.run_dense_spec_verify_case
        yield self.case("verification", case.name, run, case, refused="tree", topk=2, spec_kind="eagle")
        case = self.mla_case("mla_eagle_tree", "TARGET_VERIFY", **lengths)
        run = self.verify.run_mla_eagle_verify_case
        yield self.case("verification", case.name, run, case, refused="tree", topk=2, spec_kind="eagle")

    def draft_extend(self) -> Iterator[Case]:
        """A draft model takes in what was accepted, captured, with both ways of padding."""
        lengths = {"prefix_lens": (4, 7), "extend_lens": (3, 3)}
        dense = self.extend.run_dense_draft_extend_v2_cuda_graph_case
        mla = self.extend.run_mla_draft_extend_v2_cuda_graph_case
        for padding in ("small_real", "prod_fill"):
            for run, case in (
                (dense, self.dense_case("mha_draft_extend", "DRAFT_EXTEND_V2", **lengths)),
                (mla, self.mla_case("mla_draft_extend", "DRAFT_EXTEND_V2", **lengths)),
            ):
                yield self.case("draft extend", f"{case.name} {padding}", run, case, pad_style=padding)

    def draft_steps(self) -> Iterator[Case]:
        """Steps that a draft model runs ahead, by themselves and in a graph, which the kit captures on a GPU alone."""
        drafts = import_module(f"{KIT}.runner_modes.speculative_draft_runner")
        dense = drafts.run_dense_eagle_draft_cuda_graph_runner_case
        mla = drafts.run_mla_eagle_draft_cuda_graph_runner_case
        for run, case in (
            (dense, self.dense_case("mha_draft_steps", "DECODE", prefix_lens=(4, 7, 15))),
            (dense, self.dense_case("gqa_draft_steps", "DECODE", prefix_lens=(4, 7, 15), num_kv_heads=2)),
            (mla, self.mla_case("mla_draft_steps", "DECODE", prefix_lens=(4, 7, 15))),
        ):
            yield self.case("draft steps", case.name, run, case)

    def case(
        self, group: str, name: str, run: Callable[..., None], case: Any, *, refused: str = "", **how: Any
    ) -> Case:
        return Case(group, name, functools.partial(_run, run, case, how), refused)


def _run(run: Callable[..., None], case: Any, how: dict[str, Any], testcase: unittest.TestCase) -> None:
    run(testcase, case, device=DEVICE, **how)


class Interpreted:
    """A plugin that lets our Triton kernels serve on a CPU, under Triton's interpreter, by the name `interpreted`."""

    @hookimpl
    def taut_kernels(self) -> list[KernelProvider]:
        """The built-in provider of Triton kernels, on another target."""
        capabilities = tuple(replace(capability, targets=("cpu",)) for capability in TRITON.capabilities)
        return [replace(TRITON, name="interpreted", capabilities=capabilities, priority=100)]


def register_operations_for_cpus() -> None:
    """SGLang registers its operations, attention between captured pieces among them, for CUDA where it sees no device.

    Called before the modules that bring them are imported.
    """
    library = import_module("sglang.srt.utils.common").sglang_lib
    register = library.impl

    def on_cpu(name: str, function: Any, key: str, **how: Any) -> None:
        register(name, function, "CPU" if key == "CUDA" else key, **how)

    library.impl = on_cpu


def count_calls() -> Counter[str]:
    """Count from now on how often our backend attends."""
    from taut.adapters.sglang.backend import TautBackend

    calls: Counter[str] = Counter()
    attend = TautBackend._attend

    @functools.wraps(attend)
    def counted(*arguments: Any, **named: Any) -> Any:
        calls["ours"] += 1
        return attend(*arguments, **named)

    TautBackend._attend = counted  # type: ignore[method-assign]
    TautBackend.warm_up = lambda _: None  # type: ignore[method-assign]
    return calls


def judge(case: Case, calls: Counter[str], ours: bool) -> Outcome:
    """Run a case and say what became of it."""
    calls["ours"] = 0
    outcome, why, start = "passed", "", time.perf_counter()
    try:
        with torch.no_grad():
            case.run(unittest.TestCase())
    except unittest.SkipTest as skip:
        outcome, why = "skipped", str(skip)
    except Exception as error:  # whatever goes wrong in a case is its outcome
        outcome, why = "failed", f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        if ours and case.refused and re.search(REFUSED[case.refused], str(error)):
            outcome, why = "refused", str(error)
    if outcome == "passed" and ours and (case.refused or not calls["ours"]):
        outcome = "failed"
        why = f"it was served, not refused ({case.refused})" if case.refused else "our backend was never called"
    return Outcome(case.group, case.name, outcome, why, calls["ours"], time.perf_counter() - start)


def show(outcomes: list[Outcome], title: str) -> None:
    """The table by group, then every reason against a case."""
    table = Table("group", "passed", "refused by name", "failed", "skipped", "through ours", "seconds", title=title)
    for group in dict.fromkeys(outcome.group for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.group == group]
        counts = Counter(outcome.outcome for outcome in mine)
        cells = [counts["passed"], counts["refused"], counts["failed"], counts["skipped"]]
        cells += [sum(outcome.calls > 0 for outcome in mine), round(sum(outcome.seconds for outcome in mine))]
        table.add_row(group, *map(str, cells))
    rich.print(table)
    for outcome in outcomes:
        if outcome.outcome != "passed":
            note = (
                f" ({known_skip(outcome.why) or 'not listed: counts as a failure'})"
                if outcome.outcome == "skipped"
                else ""
            )
            why = outcome.why.partition("\n")[0][:300]
            rich.print(f"{outcome.outcome} {outcome.group}, {outcome.name}: {rich.markup.escape(why)}{note}")


def arguments(given: Iterable[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="taut", help="its name in SGLang's registry")
    parser.add_argument("--only", default="", help="only the cases whose group or name holds this")
    parser.add_argument("--report", type=Path, help="where to write every outcome, as JSON")
    parser.add_argument("--processes", type=int, default=1, help="that run side by side")
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)  # which of them this is
    return parser.parse_args(given)


def is_mine(number: int, asked: argparse.Namespace) -> bool:
    """Whether the case of this number is this process's."""
    return asked.share is None or number // NEIGHBOURS % asked.processes == asked.share


def run_cases(asked: argparse.Namespace) -> list[Outcome]:
    """Run every case that is asked for, or this process's share of them."""
    if not ON_GPU:
        registry().plugins.register(Interpreted(), name="interpreted")
        os.environ.setdefault("TAUT_KERNELS", "interpreted")
        register_operations_for_cpus()
    from sglang.srt.plugins import load_plugins

    import_module("sglang.srt.managers.scheduler")  # where it is, our drafts are registered: a process that computes
    load_plugins()
    calls = count_calls()
    cases = [case for case in Kit(asked.backend).cases() if asked.only in f"{case.group}, {case.name}"]
    outcomes = []
    for number, case in enumerate(cases):
        if is_mine(number, asked):
            outcomes.append(judge(case, calls, asked.backend == "taut"))
            said = ".FSR"[("passed", "failed", "skipped", "refused").index(outcomes[-1].outcome)]
            if outcomes[-1].is_wrong:
                said = f"\n{said} {case.group}, {case.name}: {outcomes[-1].why}\n"
            print(said, end="", flush=True)  # noqa: T201
    return outcomes


def share_out(asked: argparse.Namespace) -> list[Outcome]:
    """The outcomes of as many processes as were asked for.

    Raises:
        RuntimeError: one of them ended before its cases did.
    """
    command = [sys.executable, __file__, "--backend", asked.backend, "--only", asked.only]
    with tempfile.TemporaryDirectory() as folder:
        reports = [Path(folder) / f"{share}.json" for share in range(asked.processes)]
        options = [
            ["--processes", str(asked.processes), "--share", str(share), "--report", str(report)]
            for share, report in enumerate(reports)
        ]
        running = [subprocess.Popen([*command, *option]) for option in options]
        codes = [process.wait() for process in running]
        if not all(report.exists() for report in reports):
            raise RuntimeError(f"a process ended amid its cases; exit codes {codes}")
        told = [outcome for report in reports for outcome in json.loads(report.read_text())]
    groups = list(dict.fromkeys(outcome["group"] for outcome in told))
    return sorted((Outcome(**outcome) for outcome in told), key=lambda outcome: groups.index(outcome.group))


def main() -> int:
    asked = arguments()
    together = asked.processes > 1 and asked.share is None
    outcomes = share_out(asked) if together else run_cases(asked)
    print()  # noqa: T201
    if asked.share is None:
        import sglang

        show(outcomes, f"SGLang {sglang.__version__}, its attention kit, {asked.backend} on {DEVICE}")
    if asked.report:
        asked.report.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
    if asked.share is not None:
        return 0
    return int(any(outcome.is_wrong for outcome in outcomes) or not outcomes)


if __name__ == "__main__":
    sys.exit(main())
