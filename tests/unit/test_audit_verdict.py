"""Findings out of records, and what fails; the page that shows them."""

from __future__ import annotations

import dataclasses
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from taut.audit.operations import KINDS
from taut.audit.page import page
from taut.audit.picture import _without_pauses, picture
from taut.audit.records import Device, Event, Kernel, Layer, Padding, Place, Run, Scope, Step
from taut.audit.report import Report
from taut.audit.shown import busiest, short
from taut.audit.verdict import ADVICE, JUDGED, WASTE, Finding, Summary, failures, summary

LAYERS = ("layers.0", "layers.1", "layers.2")
BACKEND, HELPER, ENGINE = (
    Place("backend.py", 7, "forward"),
    Place("helper.py", 9, "merge"),
    Place("engine.py", 1, "run"),
)


def event(name: str, kinds: dict[str, int], by: str = "backend", **different: Any) -> Event:
    usual = {"began": 1.0, "ended": 2.0, "moved": 64, "taken": 0, "at": HELPER, "through": BACKEND}
    return Event(name, by, kinds, **(usual | different))


def step(kind: str = "decode", extra: tuple[Event, ...] = (), compiled: tuple[str, ...] = ()) -> Step:
    """Metadata with one launch, and three layers with two launches and a fill; the last one with more."""
    scopes = [Scope("metadata", "metadata", 0.0, 1.0, [event("_C.plan", {"launches": 1}, moved=None)])]
    for name in LAYERS:
        usual = [
            event("triton.attention", {"launches": 1}, moved=None, splits={"NUM_KV_SPLITS": 4}),
            event("aten.zero_", {"launches": 1, "fills": 1}),
            event("aten.empty", {"allocations": 1}, "engine", taken=512, at=ENGINE, through=None, moved=0),
        ]
        scopes.append(Scope(name, "layer", 1.0, 9.0, usual + (list(extra) if name == LAYERS[-1] else [])))
    return Step(kind, [100, 50], 2, 0, list(compiled), scopes, 0.01)


def run(*steps: Step, **different: Any) -> Run:
    layers = [Layer(name, 8, 2, 64, 64, 2, 2) for name in LAYERS]
    usual = {"asked": "stock", "engine": "vllm", "device": "NVIDIA H200", "layers": layers, "steps": list(steps)}
    return Run(**(usual | different))


def test_scopes_that_are_alike_are_one_row() -> None:
    judged = summary(run(step(), step()), "decode")
    metadata, layers = judged.rows
    assert (metadata.name, metadata.scopes, metadata.counts) == ("metadata", 1, {"launches": 1})
    assert (layers.name, layers.scopes) == ("layers.0 … layers.2", 3)
    assert layers.counts == {"launches": 2, "fills": 1}
    assert layers.moved == 64
    assert layers.split_traffic == 2 * 2 * 8 * 4 * 65 * 4
    assert layers.floor is not None
    assert judged.totals["launches"] == 7
    assert judged.totals["fills"] == 3
    assert judged.totals["allocations"] == 0  # the engine's own is no verdict on the backend


def test_a_layer_unlike_the_others_stands_by_itself() -> None:
    copy = event("aten.copy_", {"launches": 1, "copies": 1})
    judged = summary(run(step(extra=(copy,)), step()), "decode")
    assert [row.scopes for row in judged.rows] == [1, 2, 1]
    assert judged.totals["copies"] == 0.5  # in one of two steps


def test_a_step_that_was_seen_in_part_is_in_no_average() -> None:
    """Some of its layers ran in a captured graph, or all of them did."""
    whole, without_layers = step(), dataclasses.replace(step(), scopes=step().scopes[:1])
    in_part = dataclasses.replace(step(compiled=("kernel",)), scopes=step().scopes[:-1])
    judged = summary(run(whole, without_layers, in_part, step()), "decode")
    assert (judged.steps, judged.left_out, judged.profiled) == (2, 2, 0)
    assert judged.rows == summary(run(whole), "decode").rows
    assert [finding.count for finding in judged.findings if finding.kind == "fills"] == [3]
    assert judged.totals["compiled"] == 0.25  # happened, however much was seen of the rest


def test_layers_in_a_graph_stay_unknown_whatever_the_profiler_saw_beside_them() -> None:
    in_graphs = dataclasses.replace(step(), scopes=step().scopes[:1])
    judged = summary(run(in_graphs, observed=Device({"metadata": {"launches": 1}}, [])), "decode")
    assert (judged.totals["fills"], judged.totals["launches"]) == (None, None)
    assert failures(judged, ["fills"]) == [f"fills: not seen here ({judged.unknown['fills']})"]
    assert judged.profiled == 1


def test_partial_results_of_our_schedule_are_those_of_a_decode_step() -> None:
    record = run(step("prefill"), step(), partials=640)
    assert summary(record, "decode").rows[1].split_traffic == 640
    assert summary(record, "prefill").rows[1].split_traffic != 640


def test_findings_name_lines() -> None:
    first, *others = summary(run(step(), step()), "decode").findings
    assert (first.kind, first.by, first.count, first.layers) == ("fills", "backend", 3, 3)
    assert first.where == "backend.py:7 > helper.py:9"
    assert first.size == 3 * 64
    assert [(finding.kind, finding.by, finding.where) for finding in others] == [
        ("allocations", "engine", "engine.py:1")
    ]


def test_only_the_phase_that_was_asked_for() -> None:
    fill = event("aten.fill_", {"launches": 1, "fills": 1})
    record = run(step("prefill", extra=(fill,)), step(), step())
    assert (summary(record, "decode").steps, summary(record, "decode").totals["fills"]) == (2, 3)
    assert (summary(record, "prefill").steps, summary(record, "prefill").totals["fills"]) == (1, 4)


@pytest.mark.parametrize("kind", WASTE)
def test_each_waste_fails_and_is_found(kind: str) -> None:
    clean = dataclasses.replace(step(), scopes=[Scope("layers.0", "layer", 0.0, 1.0, [])])
    dirty = dataclasses.replace(clean, scopes=[Scope("layers.0", "layer", 0.0, 1.0, [event("aten.x", {kind: 2})])])
    assert failures(summary(run(clean), "decode"), [kind]) == []
    judged = summary(run(dirty), "decode")
    assert failures(judged, [kind]) == [f"{kind}: 2 a decode step"]
    assert [finding.kind for finding in judged.findings] == [kind]
    assert all(finding.advice for finding in judged.findings)


def test_what_belongs_to_the_run() -> None:
    record = run(
        step(compiled=("kernel",)),
        padding=Padding(3, False, "rows without work get NaN or inf"),
        captured_splits={"stage1.NUM_KV_SPLITS": 256},
    )
    judged = summary(record, "decode")
    assert failures(judged, ["compiled", "not_finite"]) == ["compiled: 1 a decode step", "not_finite: 3 a decode step"]
    found = {finding.kind: finding for finding in judged.findings}
    assert found["compiled"].operation == "kernel"
    assert found["frozen_splits"].count == 256
    assert "NaN" in found["not_finite"].operation


def test_the_profiler_sees_what_no_operator_shows() -> None:
    """A library's own fill has no line; what both sources saw is counted once."""
    kernels = [Kernel("decode", "layers.0", 5.0, (264,), 1.0, 0.0), Kernel("decode", "layers.1", 6.0, (264,), 1.0, 0.0)]
    kernels.append(Kernel("merge", "layers.0", 2.0, (8,), 0.1, 0.9))
    counts = {name: {"calls": 2, "launches": 2, "fills": 2} for name in LAYERS}
    judged = summary(run(step(), observed=Device(counts, kernels)), "decode")
    assert judged.totals["fills"] == 6
    assert judged.totals["launches"] == 7  # the trace saw the metadata's too
    assert judged.totals["h2d"] == 0
    alone = [finding for finding in judged.findings if finding.operation == "seen by the profiler alone"]
    assert [(finding.kind, finding.count) for finding in alone] == [("fills", 3)]
    assert [(kernel.name, times, spent) for kernel, times, spent in busiest(kernels)] == [
        ("decode", 2, 11.0),
        ("merge", 1, 2.0),
    ]


def test_what_cannot_be_seen_is_unknown_and_fails() -> None:
    """Zero is never said of what nobody has looked at."""
    judged = summary(run(step(), device="cpu"), "decode")
    assert judged.totals["h2d"] is None
    assert judged.totals["d2h"] is None
    assert judged.totals["not_finite"] is None
    (said,) = failures(judged, ["h2d"])
    assert said.startswith("h2d: not seen here (on a CPU")
    in_graphs = run(dataclasses.replace(step(), scopes=step().scopes[:1]))
    judged = summary(in_graphs, "decode")
    assert {judged.totals[kind] for kind in WASTE} == {None}
    assert "graph" in failures(judged, ["fills"])[0]
    assert summary(run(), "decode").totals["fills"] is None


def test_every_kind_that_can_be_judged_has_a_total() -> None:
    assert set(JUDGED) <= summary(run(step()), "decode").totals.keys()


class _Tags(HTMLParser):
    """Which tags are open, and every address that a page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def report(*, observed: bool) -> Report:
    """Two backends; with a profile, the first of them has a fill and a copy in each layer, and overlapping kernels."""
    from taut.audit.work import Request

    device = None
    if observed:
        kernels, others = [Kernel("plan", "metadata", 1.0, (1, 1, 1), 0.1, 0.9, 0.0)], []
        for i, name in enumerate(LAYERS):
            at = 100.0 * (i + 1)
            fill = "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>(int)"
            kernels += [
                Kernel(fill, name, 2.0, (8, 1, 1), 0.1, 0.9, at, "fills"),
                Kernel("decode<float>", name, 5.0, (264, 1, 1), 1.0, 0.0, at + 30),
                Kernel("merge", name, 3.0, (8, 1, 1), 0.1, 0.9, at + 34),  # begins before the one ahead has ended
            ]
            others.append(Kernel("matmul", "", 7.0, (64, 1, 1), 0.5, 0.5, at + 50))
        device = Device({name: {"launches": 3} for name in LAYERS}, kernels, others)
    padding = Padding(3, True, "rows without work get finite numbers")
    records = [
        run(step("prefill"), step(), step(), observed=device, held=3 << 20, padding=padding),
        run(step(), asked="<taut>", backend="a.B", observed=device),
    ]
    return Report.of(Request("vllm", "/models/tiny", "stock"), records, "decode")


@pytest.mark.parametrize("observed", [False, True])
def test_the_page_is_whole_and_needs_nothing_else(observed: bool) -> None:
    made = report(observed=observed)
    made.failed = ["fills: 3 a decode step"]
    html = page(made)
    tags = _Tags()
    tags.feed(html)
    assert tags.open == []
    assert tags.addresses == []
    assert html.count("<svg") == (3 if observed else 1)
    assert "&lt;taut&gt;" in html
    assert ("decode&lt;float&gt;" in html) == observed
    assert "backend.py:7 &gt; helper.py:9" in html
    assert "/models" not in html
    assert "fails: fills: 3 a decode step" in html
    assert '<td>fills</td><td class="n waste">3</td><td class="n waste">3</td>' in html  # side by side
    assert '<td>held from step to step</td><td class="n">3.0 MiB</td><td class="n">?</td>' in html
    assert "2 decode steps traced" + (", 1 profiled" if observed else "") in html
    assert "Padded with 3 rows: rows without work get finite numbers." in html
    steps = json.loads(made.as_json())["runs"][0]["steps"]
    assert [("scopes" in step) for step in steps] == [True, False, True]  # the last of each kind


def test_the_picture_of_a_step_on_the_device() -> None:
    svg = picture(report(observed=True))
    tags = _Tags()
    tags.feed(svg)
    assert tags.open == []
    assert tags.addresses == []
    assert svg.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    for words in (
        "stock: 9.0 µs a layer; once a step plan 1.0 µs",
        "&lt;taut&gt;",
        "fill: vectorized_elementwise_kernel",
    ):
        assert words in svg, words
    assert "on the host" not in svg


def test_the_picture_of_a_step_on_the_host_where_no_device_was_seen() -> None:
    svg = picture(report(observed=False))
    assert "stock: the last decode step on the host" in svg
    assert "aten.zero_ fills backend.py:7" in svg
    assert "interpreter" not in svg
    made = report(observed=False)
    made.runs[0].interpreted = True
    assert picture(made).count("and that of Triton&#x27;s interpreter") == 1


def test_a_layer_without_the_pauses_of_the_host_keeps_what_overlaps() -> None:
    begins = {"b": 30.0, "a": 10.0, "c": 33.0}
    kernels = [Kernel(name, "layers.0", 5.0, (), None, None, began) for name, began in begins.items()]
    placed, end = _without_pauses(kernels)
    assert [(kernel.name, at) for kernel, at in placed] == [("a", 0.0), ("b", 5.0), ("c", 8.0)]
    assert end == 13.0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("_fwd_kernel_stage2", "_fwd_kernel_stage2"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<at::native::X, 4>(int)", "CatArrayBatchedCopy"),
        ("void vllm::concat_and_cache_mla_kernel<__nv_bfloat16>", "concat_and_cache_mla_kernel"),
        ("Memcpy HtoD (Pageable -> Device)", "Memcpy HtoD"),
    ],
)
def test_a_kernels_name_in_short(name: str, expected: str) -> None:
    assert short(name) == expected


@pytest.mark.parametrize("record", [Run, Step, Scope, Event, Finding, Summary, Padding, Device, Place])
def test_every_field_of_the_json_is_documented(record: Any) -> None:
    described = (Path(__file__).resolve().parents[2] / "docs" / "audit.md").read_text()
    assert [item.name for item in dataclasses.fields(record) if f"`{item.name}`" not in described] == []


def test_every_kind_is_documented() -> None:
    described = (Path(__file__).resolve().parents[2] / "docs" / "audit.md").read_text()
    assert [kind for kind in (*KINDS, *ADVICE) if f"`{kind}`" not in described] == []
