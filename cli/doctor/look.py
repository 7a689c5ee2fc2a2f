"""Looking around: what is installed, found and chosen, and what is wrong with it. Prints nothing, imports no engine."""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import importlib.util
import logging
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import taut
from taut.adapters.engine import serving_line
from taut.cli import UserError
from taut.cli.doctor.probes import ProbeError
from taut.cli.doctor.report import (
    Asked,
    Engine,
    EntryPoint,
    Gpu,
    Level,
    Logged,
    Model,
    Probed,
    Provider,
    Report,
    Setting,
    Torch,
    tidy,
)
from taut.common_kernels.model import is_mla, problems_of_model, text_config
from taut.common_kernels.problem import Problem, target_matches
from taut.common_kernels.providers import GROUP, KernelProvider, ProviderError, Registry, registry
from taut.engine_plugins.hooks import engines
from taut.engine_plugins.settings import PREFIX, Settings, SettingsError, read_settings, variable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from taut.adapters.engine import EngineAdapter

DISTRIBUTION = "taut-attention"
TRITON_DISTRIBUTIONS = ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-cpu")
GPU_FILES = ("/dev/nvidiactl", "/dev/kfd")
# SGLang takes an empty list of plugins for none and forgives spaces; vLLM does neither.
FORGIVING_FILTERS = frozenset({"SGLANG_PLUGINS"})
CAUSAL = frozenset({"causal"})
ALIKE = 0.85  # names of variables as near as this to one of ours are taken for a slip


def collect(
    *,
    environment: Mapping[str, str] | None = None,
    engine: str | None = None,
    model: Mapping[str, Any] | None = None,
    target: str | None = None,
    kernels: Registry | None = None,
    probe: Callable[[str], list[Probed]] | None = None,
) -> Report:
    """Look around.

    Args:
        environment: where the settings stand; None for this process's.
        engine: the only engine to look for; None for all that we can speak to.
        model: the content of a model's `config.json`, to be judged.
        target: what the model is to run on; None for the first GPU here, or the CPU.
        kernels: the kernel providers; None for those of this process.
        probe: runs the probes of an engine's ledger, by its name; None to leave them out.

    Raises:
        UserError: `engine` is none that we can speak to.
    """
    environment = os.environ if environment is None else environment
    adapters = engines()
    if engine is not None and engine not in adapters:
        raise UserError(f"--engine {engine}: taut speaks to no engine of this name. There are {', '.join(adapters)}")
    report = Report()
    with _silenced():
        settings = _settings(report, environment)
        _engines(report, [adapters[engine]] if engine else list(adapters.values()), environment)
        _torch(report)
        _triton(report)
        kernels = kernels or registry()
        _providers(report, kernels)
        target = target or (report.gpus[0].target if report.gpus else "cpu")
        choosable = _check_choice(report, kernels, settings, target)
        if model is not None and choosable:
            _model(report, kernels, settings, model, target, adapters if engine is None else {engine: adapters[engine]})
        _logged(report, kernels, settings, target, [adapters[e.name] for e in report.engines if e.version], choosable)
        for found in report.engines:
            if probe and found.version:
                _bridge(report, found.name, probe)
    return report


def _bridge(report: Report, engine: str, probe: Callable[[str], list[Probed]]) -> None:
    """What the probes of an adapter's ledger find."""
    try:
        probed = probe(engine)
    except ProbeError as error:
        says = f"{engine} cannot be imported, so that nothing of it was probed: {error}"
        report.add("wrong", engine, says, f"run python -c 'import {engine}' and mend what it says")
        return
    report.bridge += probed
    missing = [entry for entry in probed if entry.needed and entry.verdict != "here"]
    for entry in missing:
        advice = "use a release of the engine that this release of taut was made for"
        report.add("wrong", engine, f"{entry.verdict}: {entry.what}", advice)
    if not missing:
        needed = sum(entry.needed for entry in probed)
        report.add("ok", engine, f"all {needed} internals of {engine} that taut cannot do without are there")


def _logged(
    report: Report,
    kernels: Registry,
    settings: Settings,
    target: str,
    adapters: Sequence[EngineAdapter],
    choosable: bool,
) -> None:
    """What each process of an engine would log: the model's line, or without one those of usual shapes."""
    quiet = settings.log in ("warning", "error")
    for adapter in adapters:
        if settings.attention == "off":
            line = f"TAUT_ATTENTION=off: nothing is registered, {adapter.name} chooses as it would without this package"
            report.logs.append(Logged(adapter.name, "TAUT_ATTENTION=off", "" if quiet else _as_logged(line)))
            continue
        how = f"TAUT_ATTENTION={settings.attention}" if settings.attention else f"only with `{adapter.flag}`"
        for kind, provider in _who_serves(report, kernels, settings, target, choosable):
            if kind not in adapter.serves:
                continue
            version = next(engine.version for engine in report.engines if engine.name == adapter.name) or "unknown"
            table = settings.table.name if settings.table else None
            line = serving_line(kind, adapter.title, version, provider, table)
            report.logs.append(Logged(adapter.name, f"{kind}, {how}", "" if quiet else _as_logged(line)))


def _who_serves(
    report: Report, kernels: Registry, settings: Settings, target: str, choosable: bool
) -> Iterator[tuple[str, str]]:
    """Each kind of attention with the provider that would serve it."""
    if report.model:
        provider = report.model.asked[0].provider
        if provider and all(one.provider for one in report.model.asked):
            yield report.model.kind, provider
    elif choosable:
        for kind, problem in (
            ("dense", Problem("paged_attention", target, "bfloat16", "bfloat16", 32, 8, 128, 128, 16, 0, CAUSAL)),
            ("MLA", Problem("mla_decode", target, "bfloat16", "bfloat16", 128, 1, 576, 512, 64, 1, CAUSAL)),
        ):
            provider = _asked(kernels, problem, settings.kernels).provider
            if provider:
                yield kind, provider


def _as_logged(line: str) -> str:
    """As `logs.FORMAT` has it; the process and its number are known only then."""
    return f"taut INFO [PROCESS pid=NUMBER] {line}"


def _settings(report: Report, environment: Mapping[str, str]) -> Settings:
    """The settings that are right; each that is wrong becomes a finding, where an engine would stop at the first."""
    given = {name: environment[name] for name in sorted(environment) if name.startswith(PREFIX)}
    wrong = {name: says for name, value in given.items() if (says := _what_is_wrong(name, value))}
    for name, says in wrong.items():
        report.add("wrong", "settings", says, f"correct or unset {name}: every engine stops at it")
    for name in sorted(set(environment) - set(given)):
        if meant := _meant(name):
            says = f"{name} is set, which nobody reads: did you mean {meant}?"
            report.add("note", "settings", says, f"rename it to {meant}, or unset it")
    settings = read_settings({name: value for name, value in given.items() if name not in wrong})
    sources = settings.sources()
    for setting, source in sources.items():
        value = getattr(settings, setting)
        shown = value.name if isinstance(value, Path) else value  # a file's folder is nobody's business in an issue
        report.settings.append(Setting(variable(setting), None if shown is None else str(shown), source))
    if settings.attention == "off":
        report.add("note", "settings", "TAUT_ATTENTION=off: no engine uses taut", "unset it to have taut registered")
    return settings


def _what_is_wrong(name: str, value: str) -> str | None:
    try:
        read_settings({name: value})
    except SettingsError as error:
        return str(error)
    return None


def _meant(name: str) -> str | None:
    """The setting that a variable without our prefix may have been meant for: `TUAT_LOG`, `taut_log`."""
    near = difflib.get_close_matches(name.upper(), map(variable, Settings.model_fields), n=1, cutoff=ALIKE)
    return near[0] if near else None


def _engines(report: Report, adapters: Sequence[EngineAdapter], environment: Mapping[str, str]) -> None:
    report.engines = [_engine(report, adapter, environment) for adapter in adapters]
    if not any(engine.version for engine in report.engines):
        names = " or ".join(adapter.distributions[0] for adapter in adapters)
        advice = f"install {names} into this environment, or install {DISTRIBUTION} into that of your engine"
        says = f"{names} is not installed" if len(adapters) == 1 else "no engine is installed"
        report.add("wrong", "engine", f"{says} beside taut", advice)


def _engine(report: Report, adapter: EngineAdapter, environment: Mapping[str, str]) -> Engine:
    found = {name: version for name in adapter.distributions if (version := _version(name))}
    if len(found) > 1:  # one may be a name only, for programs that ask the version of the other
        found = {name: version for name, version in found.items() if _brings(name, adapter.module)} or found
    distribution = next(iter(found), None)
    version = found.get(distribution) if distribution else None
    if version is None and _is_importable(adapter.module):
        version = "unknown"
    in_range = None if version in (None, "unknown") else _in_range(str(version), adapter.releases)
    entry_point = _entry_point(report, adapter, installed=version is not None)
    listed = environment.get(adapter.plugin_filter)
    let_through = _lets_through(adapter.plugin_filter, listed)
    if version is not None:
        if len(found) > 1:
            report.add(
                "note",
                adapter.name,
                f"{' and '.join(found)} are both installed, and one has overwritten files of the other",
                "uninstall both, and install one",
            )
        if in_range:
            report.add("ok", adapter.name, f"{distribution} {version} is a release that taut was made for")
        else:
            report.add("note", adapter.name, *_out_of_range(adapter, version, in_range))
        if not adapter.serves:
            advice = f"leave TAUT_ATTENTION unset for {adapter.name}, or use another engine"
            report.add("note", adapter.name, f"this release of taut does not yet serve {adapter.name}", advice)
        if entry_point and not let_through:
            both = ",".join([*(name.strip() for name in (listed or "").split(",") if name.strip()), "taut"])
            report.add(
                "wrong",
                adapter.name,
                f"{adapter.plugin_filter}={listed} keeps {adapter.name} from loading the plugin taut: "
                f"it lists every plugin that may load, and an engine says nothing of the others",
                f"export {adapter.plugin_filter}={both} (names separated by commas, no spaces), or unset it",
            )
    return Engine(
        adapter.name,
        distribution,
        version,
        adapter.releases,
        in_range,
        adapter.flag,
        adapter.serves,
        entry_point,
        let_through,
    )


def _out_of_range(adapter: EngineAdapter, version: str, in_range: bool | None) -> tuple[str, str]:
    """What is said of a release for which this release of ours was not made, and what to do."""
    first, last = adapter.releases
    says = f"is not within {first} to {last}, for which taut {taut.__version__} was made"
    advice = "it may work: taut probes what it touches, and `taut doctor --bridge` shows what it misses"
    if in_range is None:
        return (
            f"the release of {adapter.name} is unknown, so that it cannot be told whether taut was made for it",
            advice,
        )
    if _numbers(version) < _numbers(first):
        return f"release {version} {says}: it is older", f"update {adapter.name}; {advice}"
    newer = f"update taut: pip install -U {DISTRIBUTION}, or install {adapter.name} {last}"
    return f"release {version} {says}: it is newer", f"{newer}; {advice}"


def _entry_point(report: Report, adapter: EngineAdapter, *, installed: bool) -> bool:
    """Whether the engine finds our plugin and can load it: engines hide what goes wrong there."""
    level: Level = "wrong" if installed else "note"
    points = list(importlib.metadata.entry_points(group=adapter.plugin_group))
    ours = [point for point in points if point.value.startswith("taut.")]
    report.entry_points += [_told(point, "not tried") for point in points if point not in ours[:1]]
    if not ours:
        report.add(
            level,
            adapter.name,
            f"the plugin taut is not among the entry points {adapter.plugin_group}: {adapter.name} cannot find it",
            f"reinstall it: pip install --force-reinstall --no-deps {DISTRIBUTION}",
        )
        return False
    try:
        ours[0].load()
    except Exception as error:  # whatever it is, this command is where it must be said
        report.entry_points.append(_told(ours[0], f"no: {type(error).__name__}: {error}"))
        says = f"the plugin {ours[0].value} does not load: {type(error).__name__}: {error}"
        report.add(level, adapter.name, says, f"reinstall {DISTRIBUTION}")
        return False
    report.entry_points.append(_told(ours[0], "yes"))
    return True


def _told(point: importlib.metadata.EntryPoint, loads: str) -> EntryPoint:
    package = f"{point.dist.name} {point.dist.version}" if point.dist else ""
    return EntryPoint(point.group, point.name, point.value, package, tidy(loads))


def _lets_through(filter_variable: str, listed: str | None) -> bool:
    """Whether an engine's list of the plugins it may load leaves ours in."""
    if listed is None:
        return True
    if filter_variable in FORGIVING_FILTERS:
        return not listed or "taut" in (name.strip() for name in listed.split(","))
    return "taut" in listed.split(",")


def _torch(report: Report) -> None:
    advice = "install your engine, which brings the torch it was built with, or pip install torch"
    try:
        import torch

        build = "CPU"
        if torch.version.hip:
            build = f"HIP {torch.version.hip}"
        elif torch.version.cuda:
            build = f"CUDA {torch.version.cuda}"
        report.torch = Torch(torch.__version__, build)
    except ModuleNotFoundError as error:
        missing = "torch is" if error.name == "torch" else f"torch cannot be imported: {error.name} is"
        report.add("wrong", "torch", f"{missing} missing: every kernel provider needs it", advice)
        return
    except Exception as error:  # a torch that does not fit this machine's libraries
        report.add("wrong", "torch", f"torch cannot be imported: {type(error).__name__}: {error}", advice)
        return
    report.add("ok", "torch", f"torch {report.torch.version}, built for {build}")
    try:
        report.gpus = _gpus()
    except Exception as error:  # a driver that does not answer
        report.add("wrong", "GPU", f"torch cannot use the GPU: {type(error).__name__}: {error}", "check the driver")
        return
    if report.gpus:
        return
    if any(Path(file).exists() for file in GPU_FILES):
        says = f"there is a GPU, but torch {report.torch.version}, built for {build}, cannot use it"
        report.add("note", "GPU", says, "install a torch built for this GPU, or update its driver")
    else:
        report.add("note", "GPU", "no GPU: the engine serves on the CPU")


def _gpus() -> list[Gpu]:
    import torch

    from taut.common_kernels.targets import target_of

    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        target = target_of(torch.device("cuda", index))
        gpus.append(Gpu(index, properties.name, target, round(properties.total_memory / 2**30, 1)))
    return gpus


def _triton(report: Report) -> None:
    if _is_importable("triton"):
        report.triton = next((v for name in TRITON_DISTRIBUTIONS if (v := _version(name))), "unknown")
        return
    advice = "install the triton that goes with your torch: pip install triton"
    report.add("wrong" if report.gpus else "note", "triton", "triton is missing: kernels for GPUs need it", advice)


def _providers(report: Report, kernels: Registry) -> None:
    """The providers, each with the plugin that brings it; and the plugins that are of no use."""
    points = {point.name: _told(point, "") for point in importlib.metadata.entry_points(group=GROUP)}

    def origin(plugin: str) -> str:
        if plugin == "taut":
            return "built in"
        package = points[plugin].package if plugin in points else ""
        return f"entry point {plugin}" + (f" of {package}" if package else "")

    report.providers = [_provider(p, origin(plugin)) for plugin, brought in kernels.brought.items() for p in brought]
    report.providers.sort(key=lambda provider: (-provider.priority, provider.name))
    for plugin, failure in kernels.failures.items():  # complete only now that every plugin was asked
        advice = "update or uninstall its package; the other providers serve"
        report.add("wrong", "providers", f"the {origin(plugin)} is of no use: {failure}", advice)
    for name, point in points.items():
        loads = f"no: {kernels.failures[name]}" if name in kernels.failures else "yes"
        report.entry_points.append(replace(point, loads=tidy(loads)))


def _provider(provider: KernelProvider, origin: str) -> Provider:
    return Provider(
        provider.name,
        provider.priority,
        provider.summary,
        origin,
        provider.requires,
        provider.automatic_on,
        provider.graphs,
        provider.capabilities,
    )


def _check_choice(report: Report, kernels: Registry, settings: Settings, target: str) -> bool:
    """Whether providers can be chosen from at all; says who is chosen by itself on `target`."""
    try:
        kernels.check_name(settings.kernels)
    except ProviderError as error:
        report.add("wrong", "providers", str(error), "correct TAUT_KERNELS, or uninstall what stands in the way")
        return False
    wanted = settings.kernels
    there = [p for p in kernels.providers if wanted in ("auto", p.name) and _runs_on(p, target)]
    automatic = [p.name for p in there if p.is_automatic_on(target)]
    if wanted != "auto" and there:
        report.add("ok", "providers", f"TAUT_KERNELS={wanted} has kernels for {target}")
    elif wanted == "auto" and automatic:
        report.add("ok", "providers", f"on {target} kernels are chosen from: {', '.join(automatic)}")
    elif there:
        advice = f"TAUT_KERNELS={there[0].name} has it serve all the same"
        report.add("note", "providers", f"on {target} no kernel provider is chosen by itself", advice)
    else:
        says = f"there are no kernels for {target}" + (f" with TAUT_KERNELS={wanted}" if wanted != "auto" else "")
        level: Level = "wrong" if settings.attention == "on" or wanted != "auto" else "note"
        report.add(level, "providers", says, "leave this machine to the engine's own attention: unset TAUT_ATTENTION")
    return True


def _runs_on(provider: KernelProvider, target: str) -> bool:
    complete = all(map(_is_importable, provider.requires))
    return complete and any(target_matches(pattern, target) for c in provider.capabilities for pattern in c.targets)


def _model(
    report: Report,
    kernels: Registry,
    settings: Settings,
    config: Mapping[str, Any],
    target: str,
    adapters: Mapping[str, EngineAdapter],
) -> None:
    try:
        problems = problems_of_model(config, target=target)
    except ValueError as error:
        advice = "check that this is the config.json of a language model; engines may know the model all the same"
        report.add("wrong", "model", f"cannot tell what this model asks for: {error}", advice)
        return
    asked = [_asked(kernels, problem, settings.kernels) for problem in problems]
    kind: Literal["dense", "MLA"] = "MLA" if is_mla(config) else "dense"
    lacking = list(dict.fromkeys(one.problem.operation for one in asked if one.provider is None))
    unserved = [f"no kernels for {', '.join(lacking)} on {target}"] if lacking else []
    outcomes = {
        name: _outcomes(adapter, kind, unserved)
        for name, adapter in adapters.items()
        if len(adapters) == 1 or any(engine.name == name and engine.version for engine in report.engines)
    }
    text = text_config(config)
    architectures = tuple(map(str, config.get("architectures") or ()))
    report.model = Model(str(text.get("model_type", "unknown")), architectures, kind, target, tuple(asked), outcomes)
    for name, adapter in adapters.items():
        if name in outcomes:
            mode = settings.attention or "unset"
            served = kind in adapter.serves and not unserved
            level: Level = "ok" if served else "wrong" if mode == "on" else "note"
            advice = "" if served else "the engine's own attention serves it with TAUT_ATTENTION unset, auto or off"
            report.add(level, f"model in {name}", f"TAUT_ATTENTION {mode}: {outcomes[name][mode]}", advice)


def _asked(kernels: Registry, problem: Problem, wanted: str) -> Asked:
    try:
        choice = kernels.choose(problem, wanted)
    except ProviderError:
        against = {p.name: p.refusals(problem) for p in kernels.providers if wanted in ("auto", p.name)}
        by_name_only = f"is never chosen by itself on {problem.target}"
        return Asked(problem, None, {name: tuple(reasons) or (by_name_only,) for name, reasons in against.items()})
    return Asked(problem, choice.provider.name, choice.reasons)


def _outcomes(adapter: EngineAdapter, kind: str, unserved: list[str]) -> dict[str, str]:
    """What each value of TAUT_ATTENTION means for this model."""
    own = f"{adapter.name}'s own attention"
    result = {"off": f"{own}: nothing of taut is registered"}
    reasons = [f"{kind} models are not served by this release of taut in {adapter.name}"] * (kind not in adapter.serves)
    reasons += unserved
    if not adapter.serves:
        result["unset"] = f"{own}: `{adapter.flag}` is still to come"
    elif reasons:
        result["unset"] = f"{own}; `{adapter.flag}` is refused: {'; '.join(reasons)}"
    else:
        result["unset"] = f"{own}; taut with `{adapter.flag}`"
    result["auto"] = f"{own}: {'; '.join(reasons)}" if reasons else "taut"
    result["on"] = f"{adapter.name} stops with an error: {'; '.join(reasons)}" if reasons else "taut"
    return result


def _brings(distribution: str, module: str) -> bool:
    """Whether a distribution holds the files of a module, or does not say what it holds."""
    files = importlib.metadata.files(distribution)
    return files is None or any(file.parts[0] == module for file in files)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_importable(module: str) -> bool:
    """Whether a module could be imported; a mere folder of that name, as in a checkout, does not count."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None


def _in_range(version: str, releases: tuple[str, str]) -> bool:
    return _numbers(releases[0]) <= _numbers(version) <= _numbers(releases[1])


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version.split("+")[0])[:3]))


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """What our log would say is in the findings already."""
    log = logging.getLogger("taut")
    before = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        log.setLevel(before)
