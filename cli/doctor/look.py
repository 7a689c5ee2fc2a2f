"""Looking around: what is installed, found and chosen, and what is wrong with it. Prints nothing, imports no engine."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import taut
from taut.adapters.engine import serving_line
from taut.cli import UserError
from taut.cli.doctor.probes import ProbeError
from taut.cli.doctor.report import Asked, Level, Model, Report, Row, tidy
from taut.common_kernels.model import is_mla, problems_of_model, text_config
from taut.common_kernels.problem import Problem, target_matches
from taut.common_kernels.providers import GROUP, KernelProvider, ProviderError, Registry, registry
from taut.engine_plugins import logs
from taut.engine_plugins.hooks import NOTHING_REGISTERED, engines
from taut.engine_plugins.settings import PREFIX, Settings, SettingsError, read_settings, variable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from taut.adapters.engine import EngineAdapter

DISTRIBUTION = "taut-attention"
TRITON_DISTRIBUTIONS = ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-cpu")
GPU_FILES = ("/dev/nvidiactl", "/dev/kfd")
# SGLang takes an empty list of plugins for none and forgives spaces; vLLM does neither.
FORGIVING_FILTERS = frozenset({"SGLANG_PLUGINS"})
ALIKE = 0.85  # names of variables as near as this to one of ours are taken for a slip
CAUSAL = frozenset({"causal"})
# What models usually ask for, where none is given.
USUAL: dict[str, Problem] = {
    "dense": Problem("paged_attention", "cpu", "bfloat16", "bfloat16", 32, 8, 128, 128, 16, 0, CAUSAL),
    "MLA": Problem("mla_decode", "cpu", "bfloat16", "bfloat16", 128, 1, 576, 512, 64, 1, CAUSAL),
}


def collect(
    *,
    environment: Mapping[str, str] | None = None,
    engine: str | None = None,
    model: Mapping[str, Any] | None = None,
    target: str | None = None,
    kernels: Registry | None = None,
    probe: Callable[[str], list[Row]] | None = None,
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
    if engine is not None:
        if engine not in adapters:
            there = ", ".join(adapters)
            raise UserError(f"--engine {engine}: taut speaks to no engine of this name. There are {there}")
        adapters = {engine: adapters[engine]}
    report = Report()
    settings = _settings(report, environment)
    report.engines = [_engine(report, adapter, environment) for adapter in adapters.values()]
    installed = {found["name"]: found["version"] for found in report.engines if found["version"]}
    if not installed:
        names = " or ".join(adapter.distributions[0] for adapter in adapters.values())
        says = f"{names} is not installed" if len(adapters) == 1 else "no engine is installed"
        advice = f"install {names} into this environment, or install {DISTRIBUTION} into that of your engine"
        report.add("wrong", "engine", f"{says} beside taut", advice)
    _torch(report)
    _triton(report)
    kernels = kernels or registry()
    _providers(report, kernels)
    target = target or (report.gpus[0]["target"] if report.gpus else "cpu")
    serving: dict[str, str] = {}
    if _check_choice(report, kernels, settings, target):
        ask = partial(_asked, kernels, settings.kernels)
        if model is not None:
            judged = [adapter for name, adapter in adapters.items() if name in installed or len(adapters) == 1]
            _model(report, model, target, ask, judged, settings.attention or "unset")
        serving = _who_serves(report.model, target, ask)
    for name, version in installed.items():
        report.logs += _logged(adapters[name], version, settings, serving)
        if probe:
            _bridge(report, name, probe)
    return report


def _settings(report: Report, environment: Mapping[str, str]) -> Settings:
    """The settings that are right; each that is wrong becomes a finding, where an engine would stop at the first."""
    right = {}
    for name, value in sorted(environment.items()):
        if name.startswith(PREFIX):
            try:
                read_settings({name: value})
                right[name] = value
            except SettingsError as error:
                report.add("wrong", "settings", str(error), f"correct or unset {name}: every engine stops at it")
        elif near := difflib.get_close_matches(name.upper(), map(variable, Settings.model_fields), 1, ALIKE):
            says = f"{name} is set, which nobody reads: did you mean {near[0]}?"
            report.add("note", "settings", says, f"rename it to {near[0]}, or unset it")
    settings = read_settings(right)
    for setting, source in settings.sources().items():
        value = getattr(settings, setting)
        shown = value.name if isinstance(value, Path) else value  # a file's folder is nobody's business in an issue
        report.settings.append({"name": variable(setting), "value": shown, "source": source})
    if settings.attention == "off":
        report.add("note", "settings", "TAUT_ATTENTION=off: no engine uses taut", "unset it to have taut registered")
    return settings


def _engine(report: Report, adapter: EngineAdapter, environment: Mapping[str, str]) -> Row:
    found = {name: version for name in adapter.distributions if (version := _version(name))}
    if len(found) > 1:  # one may be a name only, for programs that ask the version of the other
        found = {name: version for name, version in found.items() if _brings(name, adapter.module)} or found
    distribution, version = next(iter(found.items()), (None, "unknown" if _is_importable(adapter.module) else None))
    in_range = _in_range(version, adapter.releases) if distribution and version else None
    entry_point = _entry_point(report, adapter, "wrong" if version else "note")
    listed = environment.get(adapter.plugin_filter)
    let_through = _lets_through(adapter.plugin_filter, listed)
    if len(found) > 1:
        says = f"{' and '.join(found)} are both installed, and one has overwritten files of the other"
        report.add("note", adapter.name, says, "uninstall both, and install one")
    if version and in_range:
        report.add("ok", adapter.name, f"{distribution} {version} is a release that taut was made for")
    elif version:
        report.add("note", adapter.name, *_out_of_range(adapter, version, in_range))
    if version and not adapter.serves:
        advice = f"leave TAUT_ATTENTION unset for {adapter.name}, or use another engine"
        report.add("note", adapter.name, f"this release of taut does not yet serve {adapter.name}", advice)
    if version and entry_point and not let_through:
        both = ",".join([*filter(None, map(str.strip, (listed or "").split(","))), "taut"])
        report.add(
            "wrong",
            adapter.name,
            f"{adapter.plugin_filter}={listed} keeps {adapter.name} from loading the plugin taut: "
            "it lists every plugin that may load, and an engine says nothing of the others",
            f"export {adapter.plugin_filter}={both} (names separated by commas, no spaces), or unset it",
        )
    here = {"name": adapter.name, "distribution": distribution, "version": version, "releases": adapter.releases}
    asked = {"in_range": in_range, "flag": adapter.flag, "serves": adapter.serves}
    return {**here, **asked, "entry_point": entry_point, "let_through": let_through}


def _out_of_range(adapter: EngineAdapter, version: str, in_range: bool | None) -> tuple[str, str]:
    """What is said of a release for which this release of ours was not made, and what to do."""
    engine, (first, last) = adapter.name, adapter.releases
    says = f"release {version} is not within {first} to {last}, for which taut {taut.__version__} was made"
    advice = "it may work: taut probes what it touches, and `taut doctor --bridge` shows what it misses"
    if in_range is None:
        unknown = f"the release of {engine} is unknown, so that it cannot be told whether taut was made for it"
        return unknown, advice
    if _numbers(version) < _numbers(first):
        return f"{says}: it is older", f"update {engine}; {advice}"
    return f"{says}: it is newer", f"update taut: pip install -U {DISTRIBUTION}, or install {engine} {last}; {advice}"


def _entry_point(report: Report, adapter: EngineAdapter, level: Level) -> bool:
    """Whether the engine finds our plugin and can load it: engines hide what goes wrong there."""
    points = list(metadata.entry_points(group=adapter.plugin_group))
    ours = next((point for point in points if point.value.startswith("taut.")), None)
    report.entry_points += [_told(point, "not tried") for point in points if point != ours]
    if ours is None:
        says = f"the plugin taut is not among the entry points {adapter.plugin_group}: {adapter.name} cannot find it"
        advice = f"reinstall it: pip install --force-reinstall --no-deps {DISTRIBUTION}"
        report.add(level, adapter.name, says, advice)
        return False
    loads = "yes"
    try:
        ours.load()
    except Exception as error:  # whatever it is, this command is where it must be said
        loads = f"no: {_named(error)}"
        says = f"the plugin {ours.value} does not load: {_named(error)}"
        report.add(level, adapter.name, says, f"reinstall {DISTRIBUTION}")
    report.entry_points.append(_told(ours, loads))
    return loads == "yes"


def _told(point: metadata.EntryPoint, loads: str) -> Row:
    """An entry point, the package that brings it ("" where it is not known), and whether it loads."""
    package = f"{point.dist.name} {point.dist.version}" if point.dist else ""
    return {"group": point.group, "name": point.name, "value": point.value, "package": package, "loads": tidy(loads)}


def _lets_through(filter_variable: str, listed: str | None) -> bool:
    """Whether an engine's list of the plugins it may load leaves ours in."""
    if listed is None:
        return True
    if filter_variable in FORGIVING_FILTERS:
        return not listed or "taut" in map(str.strip, listed.split(","))
    return "taut" in listed.split(",")


def _torch(report: Report) -> None:
    advice = "install your engine, which brings the torch it was built with, or pip install torch"
    try:
        import torch
    except ModuleNotFoundError as error:
        missing = "torch is" if error.name == "torch" else f"torch cannot be imported: {error.name} is"
        report.add("wrong", "torch", f"{missing} missing: every kernel provider needs it", advice)
        return
    except Exception as error:  # a torch that does not fit this machine's libraries
        report.add("wrong", "torch", f"torch cannot be imported: {_named(error)}", advice)
        return
    builds = {"HIP": torch.version.hip, "CUDA": torch.version.cuda}
    build = next((f"{name} {version}" for name, version in builds.items() if version), "CPU")
    report.torch = {"version": torch.__version__, "build": build}
    built = f"torch {torch.__version__}, built for {build}"
    report.add("ok", "torch", built)
    try:
        report.gpus = _gpus()
    except Exception as error:  # a driver that does not answer
        report.add("wrong", "GPU", f"torch cannot use the GPU: {_named(error)}", "check the driver")
        return
    if not report.gpus and any(Path(file).exists() for file in GPU_FILES):
        advice = "install a torch built for this GPU, or update its driver"
        report.add("note", "GPU", f"there is a GPU, but {built}, cannot use it", advice)
    elif not report.gpus:
        report.add("note", "GPU", "no GPU: the engine serves on the CPU")


def _gpus() -> list[Row]:
    import torch

    from taut.common_kernels.targets import target_of

    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found, target = torch.cuda.get_device_properties(index), target_of(torch.device("cuda", index))
        memory = round(found.total_memory / 2**30, 1)
        gpus.append({"index": index, "name": found.name, "target": target, "memory_gib": memory})
    return gpus


def _triton(report: Report) -> None:
    if _is_importable("triton"):
        report.triton = next(filter(None, map(_version, TRITON_DISTRIBUTIONS)), "unknown")
        return
    advice = "install the triton that goes with your torch: pip install triton"
    report.add("wrong" if report.gpus else "note", "triton", "triton is missing: kernels for GPUs need it", advice)


def _providers(report: Report, kernels: Registry) -> None:
    """The providers, each with the plugin that brings it; and the plugins that are of no use."""
    brought = [(plugin, provider) for plugin, them in kernels.brought.items() for provider in them]
    failures = kernels.failures  # complete only now that every plugin was asked
    points = {
        point.name: _told(point, f"no: {failures[point.name]}" if point.name in failures else "yes")
        for point in metadata.entry_points(group=GROUP)
    }
    report.entry_points += points.values()

    def origin(plugin: str) -> str:
        package = points[plugin]["package"] if plugin in points else ""
        return "built in" if plugin == "taut" else f"entry point {plugin}" + (f" of {package}" if package else "")

    for plugin, provider in sorted(brought, key=lambda each: (-each[1].priority, each[1].name)):
        told = {key: getattr(provider, key) for key in ("requires", "automatic_on", "graphs", "capabilities")}
        about = {"name": provider.name, "priority": provider.priority, "summary": provider.summary}
        report.providers.append(about | {"origin": origin(plugin)} | told)
    for plugin, failure in failures.items():
        advice = "update or uninstall its package; the other providers serve"
        report.add("wrong", "providers", f"the {origin(plugin)} is of no use: {failure}", advice)


def _check_choice(report: Report, kernels: Registry, settings: Settings, target: str) -> bool:
    """Whether providers can be chosen from at all; says who is chosen by itself on `target`."""
    wanted = settings.kernels
    try:
        kernels.check_name(wanted)
    except ProviderError as error:
        report.add("wrong", "providers", str(error), "correct TAUT_KERNELS, or uninstall what stands in the way")
        return False
    there = [p for p in kernels.providers if wanted in ("auto", p.name) and _runs_on(p, target)]
    automatic = [p.name for p in there if p.is_automatic_on(target)]
    if wanted != "auto" and there:
        report.add("ok", "providers", f"TAUT_KERNELS={wanted} has kernels for {target}")
    elif automatic:
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
    config: Mapping[str, Any],
    target: str,
    ask: Callable[[Problem], Asked],
    adapters: Sequence[EngineAdapter],
    mode: str,
) -> None:
    """Who would serve a model, and what each engine would do with it."""
    try:
        problems = problems_of_model(config, target=target)
    except ValueError as error:
        advice = "check that this is the config.json of a language model; engines may know the model all the same"
        report.add("wrong", "model", f"cannot tell what this model asks for: {error}", advice)
        return
    asked = tuple(map(ask, problems))
    kind: Literal["dense", "MLA"] = "MLA" if is_mla(config) else "dense"
    lacking = list(dict.fromkeys(one.problem.operation for one in asked if one.provider is None))
    outcomes = {}
    for adapter in adapters:
        name = adapter.name
        reasons = [f"{kind} models are not served by this release of taut in {name}"] * (kind not in adapter.serves)
        reasons += [f"no kernels for {', '.join(lacking)} on {target}"] * bool(lacking)
        outcomes[name] = _outcomes(adapter, "; ".join(reasons))
        level: Level = "ok" if not reasons else "wrong" if mode == "on" else "note"
        advice = "the engine's own attention serves it with TAUT_ATTENTION unset, auto or off" if reasons else ""
        report.add(level, f"model in {name}", f"TAUT_ATTENTION {mode}: {outcomes[name][mode]}", advice)
    architectures = tuple(map(str, config.get("architectures") or ()))
    model_type = str(text_config(config).get("model_type", "unknown"))
    report.model = Model(model_type, architectures, kind, target, asked, outcomes)


def _asked(kernels: Registry, wanted: str, problem: Problem) -> Asked:
    try:
        choice = kernels.choose(problem, wanted)
    except ProviderError:
        against = {p.name: p.refusals(problem) for p in kernels.providers if wanted in ("auto", p.name)}
        by_name_only = f"is never chosen by itself on {problem.target}"
        return Asked(problem, None, {name: tuple(reasons) or (by_name_only,) for name, reasons in against.items()})
    return Asked(problem, choice.provider.name, choice.reasons)


def _outcomes(adapter: EngineAdapter, reasons: str) -> dict[str, str]:
    """What each value of TAUT_ATTENTION means for a model, with the reasons against serving it, if any."""
    own = f"{adapter.name}'s own attention"
    flag = f"; `{adapter.flag}` is refused: {reasons}" if reasons else f"; taut with `{adapter.flag}`"
    return {
        "off": f"{own}: nothing of taut is registered",
        "unset": own + (flag if adapter.serves else f": `{adapter.flag}` is still to come"),
        "auto": f"{own}: {reasons}" if reasons else "taut",
        "on": f"{adapter.name} stops with an error: {reasons}" if reasons else "taut",
    }


def _who_serves(model: Model | None, target: str, ask: Callable[[Problem], Asked]) -> dict[str, str]:
    """The provider that would serve the model, or without one each kind of attention in its usual shapes, by kind."""
    if model:
        found: dict[str, list[str | None]] = {model.kind: [one.provider for one in model.asked]}
    else:
        found = {kind: [ask(replace(problem, target=target)).provider] for kind, problem in USUAL.items()}
    return {kind: providers[0] for kind, providers in found.items() if providers[0] and all(providers)}


def _logged(adapter: EngineAdapter, version: str, settings: Settings, serving: Mapping[str, str]) -> list[Row]:
    """What each process of an engine would log."""
    if settings.attention == "off":
        lines = {"TAUT_ATTENTION=off": NOTHING_REGISTERED % adapter.name}
    else:
        how = f"TAUT_ATTENTION={settings.attention}" if settings.attention else f"only with `{adapter.flag}`"
        table = settings.table.name if settings.table else None
        lines = {
            f"{kind}, {how}": serving_line(kind, adapter.title, version, provider, table)
            for kind, provider in serving.items()
            if kind in adapter.serves
        }
    quiet = settings.log in ("warning", "error")
    said = [(when, "" if quiet else _as_logged(line)) for when, line in lines.items()]
    return [{"engine": adapter.name, "when": when, "line": line} for when, line in said]


def _as_logged(line: str) -> str:
    """A line in the log; the process and its number are known only then."""
    told = {"levelname": "INFO", "processName": "PROCESS", "process": "NUMBER", "message": line}
    return logs.FORMAT.replace("(process)d", "(process)s") % told


def _bridge(report: Report, engine: str, probe: Callable[[str], list[Row]]) -> None:
    """What the probes of an adapter's ledger find."""
    try:
        probed = probe(engine)
    except ProbeError as error:
        says = f"{engine} cannot be imported, so that nothing of it was probed: {error}"
        report.add("wrong", engine, says, f"run python -c 'import {engine}' and mend what it says")
        return
    report.bridge += probed
    needed = [entry for entry in probed if entry["needed"]]
    missing = [entry for entry in needed if entry["verdict"] != "here"]
    for entry in missing:
        advice = "use a release of the engine that this release of taut was made for"
        report.add("wrong", engine, f"{entry['verdict']}: {entry['what']}", advice)
    if not missing:
        report.add("ok", engine, f"all {len(needed)} internals of {engine} that taut cannot do without are there")


def _brings(distribution: str, module: str) -> bool:
    """Whether a distribution holds the files of a module, or does not say what it holds."""
    files = metadata.files(distribution)
    return files is None or any(file.parts[0] == module for file in files)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
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


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
