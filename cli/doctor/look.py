"""Looking around: what is installed, found and chosen, and what is wrong with it. Prints nothing, imports no engine."""

from __future__ import annotations

import difflib
import importlib.util
import os
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import taut
from taut.adapters.engine import age_of, serving_line
from taut.cli import UserError
from taut.cli.doctor.probes import ProbeError
from taut.cli.doctor.report import Level, Report, Row, tidy
from taut.common_kernels.model import is_mla, problems_of_model, text_config
from taut.common_kernels.problem import Problem, target_matches
from taut.common_kernels.providers import GROUP, KernelProvider, ProviderError, Registry, registry
from taut.common_kernels.targets import target_of
from taut.engine_plugins import logs
from taut.engine_plugins.hooks import NOTHING_REGISTERED, engines
from taut.engine_plugins.settings import PREFIX, Settings, SettingsError, read_settings, variable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from taut.adapters.engine import EngineAdapter

    Ask = Callable[[Problem], Row]

DISTRIBUTION = "taut-attention"
TRITON_DISTRIBUTIONS = ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-cpu")
GPU_FILES = ("/dev/nvidiactl", "/dev/kfd")
# SGLang takes an empty list of plugins for none and forgives spaces; vLLM does neither.
FORGIVING_FILTERS = frozenset({"SGLANG_PLUGINS"})
TRY_IT = "it may work: taut probes what it touches, and `taut doctor --bridge` shows what it misses"
ALIKE = 0.85  # names of variables as near as this to one of ours are taken for a slip
CAUSAL = frozenset({"causal"})
# What models usually ask for, where none is given.
USUAL = {
    "dense": Problem("paged_attention", "cpu", "bfloat16", "bfloat16", 32, 8, 128, 128, 16, 0, CAUSAL),
    "MLA": Problem("mla_decode", "cpu", "bfloat16", "bfloat16", 128, 1, 576, 512, 64, 1, CAUSAL),
}


def collect(
    *,
    environment: Mapping[str, str] = os.environ,
    engine: str | None = None,
    model: Mapping[str, Any] | None = None,
    target: str | None = None,
    kernels: Registry | None = None,
    probe: Callable[[str], list[Row]] | None = None,
) -> Report:
    """Look around for one engine or for all, and judge the content of a model's `config.json`.

    The target is the first GPU here, or the CPU, and the kernels are those of this process, unless they are given.
    `probe` runs the probes of an engine's ledger; without it they are left out.

    Raises:
        UserError: `engine` is none that we can speak to.
    """
    adapters = engines()
    if engine not in (None, *adapters):
        raise UserError(f"--engine {engine}: taut speaks to no engine of this name. There are {', '.join(adapters)}")
    adapters = {name: adapter for name, adapter in adapters.items() if engine in (None, name)}
    report, kernels = Report(), kernels or registry()
    settings = _settings(report, environment)
    _entry_points(report, [adapter.plugin_group for adapter in adapters.values()], kernels)
    report.engines = [_engine(report, adapter, environment) for adapter in adapters.values()]
    installed = {found["name"]: found["version"] for found in report.engines if found["version"]}
    if not installed:
        names = " or ".join(adapter.distributions[0] for adapter in adapters.values())
        says = f"{names} is not installed" if engine else "no engine is installed"
        advice = f"install {names} into this environment, or install {DISTRIBUTION} into that of your engine"
        report.add("wrong", "engine", f"{says} beside taut", advice)
    _torch(report)
    _providers(report, kernels)
    target = target or (report.gpus[0]["target"] if report.gpus else "cpu")
    asked: dict[str, list[Row]] = {}
    if _check_choice(report, kernels, settings, target):
        ask = partial(_asked, kernels, settings.kernels)
        if model is not None:
            judged = [adapter for name, adapter in adapters.items() if engine or name in installed]
            _model(report, model, target, ask, judged, settings.attention or "unset")
        usual = {kind: [ask(replace(problem, target=target))] for kind, problem in USUAL.items()}
        asked = {report.model["kind"]: report.model["asked"]} if report.model else usual
    for name, version in installed.items():
        report.logs += _logged(adapters[name], version, settings, asked)
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


def _entry_points(report: Report, engine_groups: Sequence[str], kernels: Registry) -> None:
    """The entry points by which engines find us and we find providers, and whether they load: engines hide why not."""
    asked = dict.fromkeys(kernels.brought, "yes")  # this asks every plugin; the failures are complete only then
    asked |= {plugin: f"no: {why}" for plugin, why in kernels.failures.items()}
    for point in (each for group in (*engine_groups, GROUP) for each in metadata.entry_points(group=group)):
        loads = asked.get(point.name, "not tried") if point.group == GROUP else "not tried"
        if point.group != GROUP and point.value.startswith("taut."):
            try:
                point.load()
                loads = "yes"
            except Exception as error:  # whatever it is, this command is where it must be said
                loads = f"no: {_named(error)}"
        package = f"{point.dist.name} {point.dist.version}" if point.dist else "unknown"
        told = {"group": point.group, "name": point.name, "value": point.value}
        report.entry_points.append(told | {"package": package, "loads": tidy(loads)})


def _engine(report: Report, adapter: EngineAdapter, environment: Mapping[str, str]) -> Row:
    name, (first, last), listed = adapter.name, adapter.releases, environment.get(adapter.plugin_filter)
    there = {each: release for each in adapter.distributions if (release := _version(each))}
    # A package may lend its name alone, for programs that ask for its release; an editable one lists no files.
    found = {each: release for each, release in there.items() if _brings(each, adapter.module)} or there
    distribution, version = next(iter(found.items()), (None, "unknown" if _is_importable(adapter.module) else None))
    age = age_of(version, adapter.releases) if distribution and version else None
    if len(found) > 1:
        says = f"{' and '.join(found)} are both installed, and one has overwritten files of the other"
        report.add("note", name, says, "uninstall both, and install one")
    if age == "within":
        report.add("ok", name, f"{distribution} {version} is a release that taut was made for")
    elif age:
        says = f"release {version} is not within {first} to {last}, for which taut {taut.__version__} was made"
        behind = f"taut: pip install -U {DISTRIBUTION}, or install {name} {last}" if age == "newer" else name
        report.add("note", name, f"{says}: it is {age}", f"update {behind}; {TRY_IT}")
    elif version:
        report.add("note", name, f"the release of {name} is unknown: taut may not have been made for it", TRY_IT)
    if version and not adapter.serves:
        report.add("note", name, f"this release of taut does not yet serve {name}", "leave TAUT_ATTENTION unset for it")
    points = [point for point in report.entry_points if point["group"] == adapter.plugin_group]
    loads = next((point["loads"] for point in points if point["value"].startswith("taut.")), None)
    if loads != "yes":
        says = f"is not among the entry points {adapter.plugin_group}: {name} cannot find it"
        says = f"does not load: {loads.removeprefix('no: ')}" if loads else says
        advice = f"reinstall it: pip install --force-reinstall --no-deps {DISTRIBUTION}"
        report.add("wrong" if version else "note", name, f"the plugin taut {says}", advice)
    plugins = [each.strip() for each in (listed or "").split(",") if each.strip()]
    forgiven = adapter.plugin_filter in FORGIVING_FILTERS and (not listed or "taut" in plugins)
    let_through = forgiven or listed is None or "taut" in listed.split(",")
    if version and loads == "yes" and not let_through:
        says = f"{adapter.plugin_filter}={listed} keeps {name} from loading the plugin taut: "
        says += "it lists every plugin that may load, and an engine says nothing of the others"
        mended = f"{adapter.plugin_filter}={','.join([*plugins, 'taut'])}"
        report.add("wrong", name, says, f"export {mended} (names separated by commas, no spaces), or unset it")
    told = {key: getattr(adapter, key) for key in ("name", "releases", "flag", "serves")}
    here = {"distribution": distribution, "version": version, "in_range": age == "within" if age else None}
    return told | here | {"entry_point": loads == "yes", "let_through": let_through}


def _torch(report: Report) -> None:
    """What there is of torch, of GPUs, which it alone knows, and of triton."""
    advice = "install your engine, which brings the torch it was built with, or pip install torch"
    try:
        import torch
    except Exception as error:  # it is missing, or does not fit this machine's libraries
        missing = isinstance(error, ModuleNotFoundError) and error.name == "torch"
        says = "is missing: every kernel provider needs it" if missing else f"cannot be imported: {_named(error)}"
        report.add("wrong", "torch", f"torch {says}", advice)
    else:
        builds = {"HIP": torch.version.hip, "CUDA": torch.version.cuda}
        build = next((f"{name} {version}" for name, version in builds.items() if version), "CPU")
        report.torch = {"version": torch.__version__, "build": build}
        report.add("ok", "torch", f"torch {torch.__version__}, built for {build}")
        try:
            report.gpus = _gpus()
            if not report.gpus and any(Path(file).exists() for file in GPU_FILES):
                says = f"there is a GPU, which torch, built for {build}, cannot use"
                report.add("note", "GPU", says, "install a torch built for this GPU, or update its driver")
            elif not report.gpus:
                report.add("note", "GPU", "no GPU: the engine serves on the CPU")
        except Exception as error:  # a driver that does not answer
            report.add("wrong", "GPU", f"torch cannot use the GPU: {_named(error)}", "check the driver")
    if _is_importable("triton"):
        report.triton = next(filter(None, map(_version, TRITON_DISTRIBUTIONS)), "unknown")
    else:
        advice = "install the triton that goes with your torch: pip install triton"
        report.add("wrong" if report.gpus else "note", "triton", "triton is missing: GPU kernels need it", advice)


def _gpus() -> list[Row]:
    import torch

    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found, target = torch.cuda.get_device_properties(index), target_of(torch.device("cuda", index))
        memory = round(found.total_memory / 2**30, 1)
        gpus.append({"index": index, "name": found.name, "target": target, "memory_gib": memory})
    return gpus


def _providers(report: Report, kernels: Registry) -> None:
    """The providers, each with the plugin that brings it; and the plugins that are of no use."""
    points = [(point["name"], point["package"]) for point in report.entry_points if point["group"] == GROUP]
    origins = {"taut": "built in"} | {plugin: f"entry point {plugin} of {package}" for plugin, package in points}
    keys = ("name", "priority", "summary", "requires", "automatic_on", "graphs", "capabilities")
    for plugin, providers in kernels.brought.items():
        origin = {"origin": origins.get(plugin, f"entry point {plugin}")}
        report.providers += [origin | {key: getattr(provider, key) for key in keys} for provider in providers]
    report.providers.sort(key=lambda provider: (-provider["priority"], provider["name"]))
    for plugin, failure in kernels.failures.items():
        advice = "update or uninstall its package; the other providers serve"
        report.add("wrong", "providers", f"the {origins[plugin]} is of no use: {failure}", advice)


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


def _asked(kernels: Registry, wanted: str, problem: Problem) -> Row:
    """Who serves a problem (None: nobody), and the reasons against the others."""
    try:
        choice = kernels.choose(problem, wanted)
    except ProviderError:
        by_name_only = (f"is never chosen by itself on {problem.target}",)
        meant = [provider for provider in kernels.providers if wanted in ("auto", provider.name)]
        reasons = {provider.name: tuple(provider.refusals(problem)) or by_name_only for provider in meant}
        return {"problem": problem, "provider": None, "reasons": reasons}
    return {"problem": problem, "provider": choice.provider.name, "reasons": choice.reasons}


def _model(
    report: Report, config: Mapping[str, Any], target: str, ask: Ask, adapters: Iterable[EngineAdapter], mode: str
) -> None:
    """Who would serve a model, and what each value of TAUT_ATTENTION means for it in each engine."""
    try:
        asked = list(map(ask, problems_of_model(config, target=target)))
    except ValueError as error:
        advice = "check that this is the config.json of a language model; engines may know the model all the same"
        report.add("wrong", "model", f"cannot tell what this model asks for: {error}", advice)
        return
    kind = "MLA" if is_mla(config) else "dense"
    lacking = dict.fromkeys(one["problem"].operation for one in asked if not one["provider"])
    outcomes: dict[str, dict[str, str]] = {}
    for adapter in adapters:
        name, own = adapter.name, f"{adapter.name}'s own attention"
        against = [f"{kind} models are not served by this release of taut in {name}"] * (kind not in adapter.serves)
        against += [f"no kernels for {', '.join(lacking)} on {target}"] * bool(lacking)
        why = "; ".join(against)
        flag = f"`{adapter.flag}` is refused: {why}" if why else f"taut with `{adapter.flag}`"
        says = {"off": f"{own}: nothing of taut is registered", "unset": f"{own}; {flag}", "auto": "taut", "on": "taut"}
        if why:
            says |= {"auto": f"{own}: {why}", "on": f"{name} stops with an error: {why}"}
        level: Level = "ok" if not why else "wrong" if mode == "on" else "note"
        advice = "the engine's own attention serves it with TAUT_ATTENTION unset, auto or off" if why else ""
        report.add(level, f"model in {name}", f"TAUT_ATTENTION {mode}: {says[mode]}", advice)
        outcomes[name] = says
    told = {"model_type": str(text_config(config).get("model_type", "unknown")), "kind": kind, "target": target}
    architectures = tuple(map(str, config.get("architectures") or ()))
    report.model = told | {"architectures": architectures, "asked": asked, "outcomes": outcomes}


def _logged(adapter: EngineAdapter, version: str, settings: Settings, asked: Mapping[str, list[Row]]) -> list[Row]:
    """What each process of an engine would log."""
    how = f"TAUT_ATTENTION={settings.attention}" if settings.attention else f"only with `{adapter.flag}`"
    lines = {}
    for kind, rows in asked.items():
        if kind in adapter.serves and all(row["provider"] for row in rows):
            table, provider = settings.table and settings.table.name, rows[0]["provider"]
            lines[f"{kind}, {how}"] = _as_logged(serving_line(kind, adapter.title, version, provider, table))
    if settings.attention == "off":
        lines = {how: _as_logged(NOTHING_REGISTERED % adapter.name)}
    if settings.log in ("warning", "error"):
        lines = dict.fromkeys(lines, "")
    return [{"engine": adapter.name, "when": when, "line": line} for when, line in lines.items()]


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
    needed = [(entry["verdict"], entry["what"]) for entry in probed if entry["needed"]]
    missing = [f"{verdict}: {what}" for verdict, what in needed if verdict != "here"]
    for says in missing:
        report.add("wrong", engine, says, "use a release of the engine that this release of taut was made for")
    if not missing:
        report.add("ok", engine, f"all {len(needed)} internals of {engine} that taut cannot do without are there")


def _version(distribution: str) -> str | None:
    return next((found.version for found in metadata.distributions(name=distribution)), None)


def _brings(distribution: str, module: str) -> bool:
    """Whether a distribution holds the files of a module, or does not say what it holds."""
    files = metadata.files(distribution)
    return files is None or any(file.parts[0] == module for file in files)


def _is_importable(module: str) -> bool:
    """Whether a top-level module could be imported; a mere folder of that name, as in a checkout, does not count."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def _runs_on(provider: KernelProvider, target: str) -> bool:
    return not provider.missing and any(target_matches(p, target) for can in provider.capabilities for p in can.targets)


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
