"""Providers: found, chosen once, explained; and what goes wrong is said."""

from __future__ import annotations

import logging
import sys
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import EntryPoint
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pluggy
import pytest

from taut.common_kernels import builtin, gluon_features
from taut.common_kernels import registry as registry_module
from taut.common_kernels.kernels import CONTRACT
from taut.common_kernels.problem import OPERATIONS, Capability, Problem
from taut.common_kernels.providers import (
    GROUP,
    HookSpecs,
    KernelProvider,
    ProviderError,
    Registry,
    default_registry,
    hookimpl,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from taut.common_kernels.kernels import Kernels

PROBLEM = Problem(
    operation="paged_attention",
    target="cpu",
    dtype="float32",
    cache_dtype="float32",
    q_heads=4,
    kv_heads=2,
    head_size=16,
    value_size=16,
    page_size=16,
    features=frozenset({"causal"}),
)


def provider(name: str, priority: int = 0, **fields: Any) -> KernelProvider:
    """One that can serve any paged attention unless told otherwise."""
    fields.setdefault("capabilities", (Capability("paged_attention"),))
    fields.setdefault("load", lambda: cast("Kernels", name))
    return KernelProvider(name=name, summary=f"the provider {name}", priority=priority, **fields)


def plugin(*providers: KernelProvider, choose: Callable[..., KernelProvider | None] | None = None) -> object:
    """What a package registers."""

    class Plugin:
        @hookimpl
        def taut_kernels(self) -> Sequence[KernelProvider]:
            return providers

        if choose is not None:

            @hookimpl
            def taut_choose(self, problem: Problem, candidates: Sequence[KernelProvider]) -> KernelProvider | None:
                return choose(problem, candidates)

    return Plugin()


def registry_of(*plugins: object) -> Registry:
    """A registry of these plugins alone."""
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(HookSpecs)
    for one in plugins:
        manager.register(one)
    return Registry(manager)


class Records(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def lines(self, level: int) -> list[str]:
        return [record.getMessage() for record in self.records if record.levelno == level]


@contextmanager
def logged() -> Iterator[Records]:
    """What "taut.providers" logs, whatever the process's logging is set to (an engine may cut propagation)."""
    logger, records = logging.getLogger("taut.providers"), Records()
    level, disabled = logger.level, logger.disabled
    logger.addHandler(records)
    logger.setLevel(logging.DEBUG)
    logger.disabled = False
    try:
        yield records
    finally:
        logger.removeHandler(records)
        logger.setLevel(level)
        logger.disabled = disabled


# The choice


def test_the_highest_priority_that_can_serve_is_chosen() -> None:
    registry = registry_of(plugin(provider("low", 1), provider("high", 9)), plugin(provider("middle", 5)))
    assert [p.name for p in registry.providers] == ["high", "middle", "low"]
    choice = registry.choose(PROBLEM)
    assert choice.provider.name == "high"
    assert set(choice.reasons) == {"middle", "low"}


def test_equal_priorities_are_ordered_by_name() -> None:
    registry = registry_of(plugin(provider("b"), provider("a")))
    assert registry.choose(PROBLEM).provider.name == "a"


def test_one_choice_per_problem() -> None:
    asked = []

    def choose(problem: Problem, candidates: Sequence[KernelProvider]) -> None:
        asked.append(problem)

    registry = registry_of(plugin(provider("a"), provider("b"), choose=choose))
    first = registry.choose(PROBLEM)
    assert registry.choose(replace(PROBLEM)) is first
    assert asked == [PROBLEM]
    other = replace(PROBLEM, page_size=1)
    assert registry.choose(other) is not first
    assert asked == [PROBLEM, other]
    assert registry.choose(PROBLEM, "b").provider.name == "b"
    assert registry.choose(PROBLEM) is first


def test_kernels_are_loaded_once_and_late() -> None:
    loaded = []

    def load() -> Kernels:
        loaded.append(1)
        return cast("Kernels", "kernels")

    registry = registry_of(plugin(provider("a", load=load), provider("b", 1, load=load)))
    choice = registry.choose(PROBLEM)
    assert not loaded
    assert choice.provider.kernels is choice.provider.kernels
    assert loaded == [1]


def test_reasons_are_kept_and_print() -> None:
    gpu_only = Capability("paged_attention", ("sm_90",), page_sizes=frozenset({64}))
    narrow = provider("narrow", 9, capabilities=(gpu_only,))
    other = provider("other", 8, capabilities=(Capability("merge"),))
    registry = registry_of(plugin(narrow, other, provider("wide", 1), provider("spare")))
    choice = registry.choose(PROBLEM)
    assert choice.reasons["narrow"] == ("runs on sm_90, not on cpu", "page size 16 is not among 64")
    assert choice.explain().splitlines() == [
        f"{PROBLEM} -> wide",
        "  not narrow: runs on sm_90, not on cpu; page size 16 is not among 64",
        "  not other: does not provide paged_attention",
        "  not spare: wide comes first",
    ]


def test_the_nearest_of_several_capabilities_gives_the_reason() -> None:
    far = Capability("paged_attention", ("sm_90",), page_sizes=frozenset({64}))
    near = Capability("paged_attention", page_sizes=frozenset({1}))
    assert provider("p", capabilities=(far, near)).refusals(PROBLEM) == ["page size 16 is not among 1"]
    assert provider("p", capabilities=(far, Capability("paged_attention"))).refusals(PROBLEM) == []


def test_an_explicit_choice_that_cannot_serve_names_every_reason() -> None:
    gpu_only = Capability("paged_attention", ("sm_90",), page_sizes=frozenset({64}))
    narrow = provider("narrow", 9, capabilities=(gpu_only,))
    registry = registry_of(plugin(narrow, provider("wide")))
    with pytest.raises(ProviderError) as error:
        registry.choose(PROBLEM, "narrow")
    message = str(error.value)
    assert "narrow: runs on sm_90, not on cpu; page size 16 is not among 64" in message
    assert "wide" not in message
    assert "TAUT_KERNELS=auto" in message
    assert registry.choose(PROBLEM, "wide").provider.name == "wide"


def test_nobody_can_serve() -> None:
    registry = registry_of(
        plugin(
            provider("gpu", 2, capabilities=(Capability("paged_attention", ("sm_80+",)),)),
            provider("decode", 1, capabilities=(Capability("paged_attention", max_query=1),)),
            provider("elsewhere", automatic_on=("gfx942",)),
        )
    )
    with pytest.raises(ProviderError) as error:
        registry.choose(PROBLEM)
    message = str(error.value)
    assert str(PROBLEM) in message
    assert "gpu: runs on sm_80+, not on cpu" in message
    assert "decode: takes at most 1 query tokens a row" in message
    assert "TAUT_KERNELS=elsewhere" in message
    assert "TAUT_ATTENTION=off" in message


def test_an_automatic_choice_falls_back_and_says_so_once() -> None:
    narrow = provider("narrow", 9, capabilities=(Capability("paged_attention", page_sizes=frozenset({64})),))
    registry = registry_of(plugin(narrow, provider("wide", 1), provider("spare")))
    with logged() as records:
        registry.choose(PROBLEM)
        registry.choose(PROBLEM)
        registry.choose(replace(PROBLEM, q_heads=8))  # another layer, the same reason
    assert records.lines(logging.INFO) == [
        "paged_attention: wide serves instead of narrow (page size 16 is not among 64)"
    ]
    with logged() as records:
        registry.choose(replace(PROBLEM, page_size=1))  # another reason is said
    assert len(records.lines(logging.INFO)) == 1


def test_a_choice_by_name_is_no_fallback() -> None:
    registry = registry_of(plugin(provider("high", 9), provider("low")))
    with logged() as records:
        choice = registry.choose(PROBLEM, "low")
    assert choice.provider.name == "low"
    assert choice.reasons == {"high": ("TAUT_KERNELS=low asks for another",)}
    assert records.lines(logging.INFO) == []


def test_some_are_never_chosen_by_themselves() -> None:
    shy = provider("shy", 9, automatic_on=("gfx942", "sm_90+"))
    registry = registry_of(plugin(shy, provider("plain")))
    choice = registry.choose(PROBLEM)
    assert choice.provider.name == "plain"
    assert "TAUT_KERNELS=shy" in choice.reasons["shy"][0]
    assert registry.choose(PROBLEM, "shy").provider is shy
    assert registry.choose(replace(PROBLEM, target="gfx942")).provider is shy
    assert registry.choose(replace(PROBLEM, target="sm_120")).provider is shy  # patterns, as in capabilities
    assert registry.choose(replace(PROBLEM, target="sm_89")).provider.name == "plain"


@pytest.mark.parametrize("module", ["no_such_module", "no_such_module.inner", "json.no_such_module"])
def test_a_missing_module_is_a_reason(module: str) -> None:
    needy = provider("needy", 9, requires=("json", module))
    registry = registry_of(plugin(needy, provider("plain")))
    assert registry.choose(PROBLEM).provider.name == "plain"
    (reason,) = registry.choose(PROBLEM).reasons["needy"]
    assert reason.startswith(f"needs {module}, which this environment lacks")
    with pytest.raises(ProviderError, match="which this environment lacks"):
        registry.choose(PROBLEM, "needy")


def test_a_probe_is_asked_once_and_last() -> None:
    asked = []

    def probe() -> list[str]:
        asked.append(1)
        return ["this environment lacks a warp"]

    gpu_only = (Capability("paged_attention", ("sm_90",)),)
    registry = registry_of(plugin(provider("fine", 9, capabilities=gpu_only, probe=probe), provider("plain")))
    assert registry.choose(PROBLEM).provider.name == "plain"
    assert not asked  # another target: nothing is imported to look
    for page_size in (1, 2):
        choice = registry.choose(replace(PROBLEM, target="sm_90", page_size=page_size))
        assert choice.provider.name == "plain"
        assert choice.reasons["fine"] == ("this environment lacks a warp",)
    assert asked == [1]


def test_on_hopper_its_own_kernels_are_taken_and_the_portable_ones_where_those_do_not_serve() -> None:
    registry = default_registry(points=[])
    problem = Problem("paged_attention", "sm_90", "bfloat16", "bfloat16", 32, 8, 128, 128, 16)
    assert registry.choose(problem).provider is builtin.HOPPER
    for other in (replace(problem, target="sm_100"), replace(problem, cache_dtype="float8_e4m3fn")):
        assert registry.choose(other).provider is builtin.TRITON
        assert registry.choose(other).reasons["hopper"]


def test_every_capability_of_a_provider_has_its_operation() -> None:
    for one in default_registry(points=[]).providers:
        for operation in {capability.operation for capability in one.capabilities}:
            assert callable(getattr(one.kernels, operation)), f"{one.name}.{operation}"


@pytest.mark.parametrize("name", ["json", "no_such_module"])
def test_what_a_triton_lacks_of_gluon_is_said(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(
        gluon_features, "NEEDED", {"json": ("loads", ("new", "dumps")), name: ("gone", ("older", "old"))}
    )
    reasons = gluon_features.missing()
    assert reasons
    assert all("this environment's triton has no" in reason and name in reason for reason in reasons)


@pytest.mark.parametrize(("release", "can"), [("12.8", True), ("13.1", False), ("unknown", True), (None, True)])
def test_whether_registers_can_move_is_asked_of_the_assembler(
    monkeypatch: pytest.MonkeyPatch, release: str | None, can: bool
) -> None:
    compiler = SimpleNamespace()
    if release is not None:
        compiler.get_ptxas = lambda _: SimpleNamespace(version=release)
    monkeypatch.setitem(sys.modules, "triton.backends.nvidia.compiler", compiler)
    assert gluon_features.registers_can_move.__wrapped__() is can


# The hook that decides


def test_taut_choose_decides_an_automatic_choice() -> None:
    seen: list[tuple[str, ...]] = []

    def choose(problem: Problem, candidates: Sequence[KernelProvider]) -> KernelProvider | None:
        seen.append(tuple(p.name for p in candidates))
        return candidates[-1] if problem.page_size == 16 else None

    unable = provider("unable", 9, capabilities=())
    registry = registry_of(plugin(provider("low"), provider("high", 5), unable, choose=choose))
    with logged() as records:
        choice = registry.choose(PROBLEM)
    assert choice.provider.name == "low"
    assert seen == [("high", "low")]  # those that can serve, best first
    assert choice.reasons["high"] == ("a taut_choose hook took low",)
    lines = records.lines(logging.INFO)
    assert "paged_attention: low serves instead of unable (does not provide paged_attention)" in lines
    assert registry.choose(replace(PROBLEM, page_size=1)).provider.name == "high"  # the hook left it alone
    assert registry.choose(PROBLEM, "high").provider.name == "high"  # a name is not put to the vote


def test_taut_choose_must_take_a_candidate() -> None:
    stranger = provider("stranger")
    registry = registry_of(plugin(provider("a"), provider("b"), choose=lambda *_: stranger))
    with pytest.raises(ProviderError, match=r"taut_choose.*stranger.*a, b"):
        registry.choose(PROBLEM)


# Names


def test_duplicate_names() -> None:
    registry = registry_of(plugin(provider("twice")), plugin(provider("twice", 3)))
    with pytest.raises(ProviderError, match="two kernel providers are named 'twice'"):
        registry.choose(PROBLEM)


def test_a_misspelt_name_is_told_the_nearest() -> None:
    registry = registry_of(plugin(provider("reference"), provider("triton")))
    with pytest.raises(ProviderError) as error:
        registry.choose(PROBLEM, "tritn")
    assert str(error.value) == (
        "TAUT_KERNELS=tritn names no kernel provider: did you mean 'triton'? There are auto, reference, triton"
    )
    with pytest.raises(ProviderError, match="names no kernel provider: There are auto"):
        registry.check_name("zzzzzz")
    registry.check_name("auto")
    registry.check_name("triton")


# Entry points


def entry_point(folder: Path, name: str, source: str) -> EntryPoint:
    """An entry point of the group whose module has this source."""
    module = f"taut_test_{name}"
    sys.modules.pop(module, None)
    (folder / f"{module}.py").write_text(source)
    return EntryPoint(name, module, GROUP)


GOOD = """
from taut.common_kernels.problem import Capability
from taut.common_kernels.providers import KernelProvider, hookimpl

@hookimpl
def taut_kernels():
    return [KernelProvider("good", "a good one", 50, (Capability("paged_attention"),), lambda: "kernels")]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_builtin_providers_are_there() -> None:
    registry = default_registry(points=[])
    assert "reference" in [p.name for p in registry.providers]
    for operation in OPERATIONS:
        choice = registry.choose(replace(PROBLEM, operation=operation))  # type: ignore[arg-type]
        assert callable(getattr(choice.provider.kernels, operation))


def test_the_reference_serves_on_a_gpu_only_when_asked() -> None:
    registry = registry_of(plugin(builtin.REFERENCE))
    on_gpu = replace(PROBLEM, target="sm_90")
    with pytest.raises(ProviderError, match="TAUT_KERNELS=reference"):
        registry.choose(on_gpu)
    assert registry.choose(on_gpu, "reference").provider is builtin.REFERENCE


def test_a_good_entry_point_serves(folder: Path) -> None:
    registry = default_registry([entry_point(folder, "good", GOOD)])
    assert registry.failures == {}
    assert registry.choose(PROBLEM).provider.name == "good"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import a_module_that_nobody_has", "ModuleNotFoundError: No module named 'a_module_that_nobody_has'"),
        ("raise RuntimeError('no luck')", "RuntimeError: no luck"),
        ("def (", "SyntaxError"),
        (
            "from taut.common_kernels.providers import hookimpl\n@hookimpl\ndef taut_kernel(): return []",
            "PluginValidationError: unknown hook 'taut_kernel'",
        ),
        (
            "from taut.common_kernels.providers import hookimpl\n@hookimpl\ndef taut_kernels(): raise OSError('later')",
            "OSError: later",
        ),
        (
            "from taut.common_kernels.providers import hookimpl\n@hookimpl\ndef taut_kernels(): return ['name']",
            "TypeError: taut_kernels gave 'name', not a KernelProvider",
        ),
        (
            "from taut.common_kernels.providers import hookimpl\n@hookimpl\ndef taut_kernels(): return 7",
            "TypeError",
        ),
    ],
    ids=["import", "raises", "syntax", "unknown_hook", "hook_raises", "no_provider", "no_list"],
)
def test_an_entry_point_that_fails_is_loud_and_remembered(folder: Path, source: str, reason: str) -> None:
    points = [entry_point(folder, "bad", source), entry_point(folder, "good", GOOD)]
    with logged() as records:
        registry = default_registry(points)
        assert registry.choose(PROBLEM).provider.name == "good"  # the others serve
    (line,) = records.lines(logging.ERROR)
    assert "bad (taut_test_bad)" in line
    assert registry.failures["bad"].startswith(reason)
    with pytest.raises(ProviderError, match="TAUT_KERNELS=bad: its entry point did not load") as error:
        registry.choose(PROBLEM, "bad")
    assert reason in str(error.value)
    # One that brings a provider of another name is found by the list of what failed.
    with pytest.raises(ProviderError, match="did not load: bad"):
        registry.choose(PROBLEM, "another")


@pytest.mark.parametrize(
    ("ours", "theirs", "advice"),
    [
        (3, ", contract=2", "install a release of its package for version 3"),
        (3, "", "install a release of its package for version 3"),  # whoever says nothing wrote for the first
        (3, ", contract=4", "update taut-attention, or install a release of its package for version 3"),
    ],
    ids=["older", "silent", "newer"],
)
def test_a_provider_for_another_version_of_the_contract_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, ours: int, theirs: str, advice: str
) -> None:
    """By the first look at it: nothing of its kernels is imported, and others serve."""
    monkeypatch.setattr(registry_module, "CONTRACT", ours)
    monkeypatch.setattr(builtin, "TRITON", replace(builtin.TRITON, contract=ours))
    monkeypatch.setattr(builtin, "HOPPER", replace(builtin.HOPPER, contract=ours))
    monkeypatch.setattr(builtin, "REFERENCE", replace(builtin.REFERENCE, contract=ours))
    source = GOOD.replace('lambda: "kernels")', f"lambda: 1 / 0{theirs})")
    with logged() as records:
        registry = default_registry([entry_point(folder, "good", source)])
        assert registry.choose(PROBLEM).provider.name == "reference"
    version = theirs.removeprefix(", contract=") or "1"
    sentence = (
        f"the provider 'good' was written for version {version} of the kernels' contract, this taut-attention has "
        f"version {ours}: {advice}"
    )
    assert registry.failures == {"good": sentence}
    (line,) = records.lines(logging.ERROR)
    assert sentence in line
    with pytest.raises(ProviderError, match="TAUT_KERNELS=good") as error:
        registry.choose(PROBLEM, "good")
    assert sentence in str(error.value)


def test_the_built_in_providers_are_for_this_version_of_the_contract() -> None:
    """They say so themselves: a provider that says nothing was written for the first version."""
    assert {p.contract for p in (builtin.REFERENCE, builtin.TRITON, builtin.HOPPER)} == {CONTRACT}
    assert provider("silent").contract == 1


@pytest.mark.parametrize("name", ["taut", "good"])
def test_a_second_entry_point_of_a_name_leaves_the_first_alone(folder: Path, name: str) -> None:
    """The first is kept, the built-in one too; the second is refused aloud."""
    first = entry_point(folder, "good", GOOD)
    (folder / "taut_test_second.py").write_text("")
    sys.modules.pop("taut_test_second", None)
    with logged() as records:
        registry = default_registry([first, EntryPoint(name, "taut_test_second", GROUP)])
    assert len(records.lines(logging.ERROR)) == 1
    assert name in registry.failures
    assert {"reference", "good"} <= {p.name for p in registry.providers}


def test_providers_are_asked_once_per_process(folder: Path) -> None:
    source = GOOD.replace("def taut_kernels():", "def taut_kernels():\n    calls.append(1)") + "\ncalls = []\n"
    registry = default_registry([entry_point(folder, "counted", source)])
    for page_size in (1, 2, 3):
        registry.choose(replace(PROBLEM, page_size=page_size))
    assert sys.modules["taut_test_counted"].calls == [1]  # type: ignore[attr-defined]
