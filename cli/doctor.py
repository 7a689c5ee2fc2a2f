"""`taut doctor`: what is installed, what would serve, and why; made to be pasted into an issue.

`collect` looks around and never prints, `render` is for people, `as_json` for programs. No engine is imported: a broken
engine must not keep the doctor from saying what is wrong. torch is, because only torch knows which GPUs it can use.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

import taut
from taut.cli import UserError
from taut.common_kernels.model import is_mla, problems_of_model, text_config
from taut.common_kernels.problem import Capability, Problem, target_matches
from taut.common_kernels.providers import GROUP, KernelProvider, ProviderError, Registry, registry
from taut.engine_plugins.hooks import engines
from taut.engine_plugins.settings import PREFIX, Settings, SettingsError, read_settings, variable

if TYPE_CHECKING:
    from pluggy import HookImpl

    from taut.adapters.engine import EngineAdapter

Level = Literal["ok", "note", "wrong"]
# Operations with a mask; for the others the features say nothing.
MASKED = ("paged_attention", "ragged_attention", "mla_decode")
STYLES: dict[Level, str] = {"ok": "green", "note": "yellow", "wrong": "bold red"}

DISTRIBUTION = "taut-attention"
TRITON_DISTRIBUTIONS = ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-cpu")
GPU_FILES = ("/dev/nvidiactl", "/dev/kfd")
# SGLang takes an empty list of plugins for none and forgives spaces; vLLM does neither.
FORGIVING_FILTERS = frozenset({"SGLANG_PLUGINS"})


@dataclass(frozen=True)
class Finding:
    """One thing the doctor has to say.

    Args:
        level: "ok", "note" (worth knowing) or "wrong" (to be put right).
        about: what it concerns, in a word or two.
        says: the finding, a sentence.
        advice: what to do; "" where nothing is to be done.
    """

    level: Level
    about: str
    says: str
    advice: str = ""


@dataclass(frozen=True)
class Engine:
    """An engine as it is installed here; `version` is None where it is not, "unknown" where no package tells it."""

    name: str
    distribution: str | None
    version: str | None
    releases: tuple[str, str]
    in_range: bool | None
    flag: str
    serves: tuple[str, ...]
    entry_point: bool
    let_through: bool


@dataclass(frozen=True)
class Torch:
    """torch as it is installed here; `build` is "CUDA 12.9", "HIP 6.4" or "CPU"."""

    version: str
    build: str


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch can use."""

    index: int
    name: str
    target: str
    memory_gib: float


@dataclass(frozen=True)
class Provider:
    """A kernel provider, where it comes from and what it can do."""

    name: str
    priority: int
    summary: str
    origin: str
    requires: tuple[str, ...]
    automatic_on: tuple[str, ...]
    graphs: bool
    capabilities: tuple[Capability, ...]


@dataclass(frozen=True)
class Setting:
    """A setting; `source` is its variable, or "default"."""

    name: str
    value: str | None
    source: str


@dataclass(frozen=True)
class Asked:
    """A problem of the model: who serves it (None: nobody), and the reasons against the others."""

    problem: Problem
    provider: str | None
    reasons: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Model:
    """What a model asks for; `outcomes`: engine -> value of TAUT_ATTENTION -> what would happen there."""

    model_type: str
    architectures: tuple[str, ...]
    kind: Literal["dense", "MLA"]
    target: str
    asked: tuple[Asked, ...]
    outcomes: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Probed:
    """An entry of an adapter's ledger, and what its probe found in the engine that is installed."""

    engine: str
    what: str
    since: str
    until: str
    verdict: str
    needed: bool


@dataclass
class Report:
    """Everything the doctor found."""

    taut: str = taut.__version__
    python: str = field(default_factory=platform.python_version)
    platform: str = field(default_factory=lambda: f"{platform.system()} {platform.machine()}")
    torch: Torch | None = None
    triton: str | None = None
    gpus: list[Gpu] = field(default_factory=list)
    engines: list[Engine] = field(default_factory=list)
    providers: list[Provider] = field(default_factory=list)
    settings: list[Setting] = field(default_factory=list)
    model: Model | None = None
    bridge: list[Probed] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def wrong(self) -> bool:
        """Whether anything has to be put right."""
        return any(finding.level == "wrong" for finding in self.findings)

    def add(self, level: Level, about: str, says: str, advice: str = "") -> None:
        """Add a finding."""
        self.findings.append(Finding(level, about, _tidy(says), _tidy(advice)))


def collect(
    *,
    environment: Mapping[str, str] | None = None,
    engine: str | None = None,
    model: Mapping[str, Any] | None = None,
    target: str | None = None,
    kernels: Registry | None = None,
    bridge: bool = False,
) -> Report:
    """Look around.

    Args:
        environment: where the settings stand; None for this process's.
        engine: the only engine to look for; None for all that we can speak to.
        model: the content of a model's `config.json`, to be judged.
        target: what the model is to run on; None for the first GPU here, or the CPU.
        kernels: the kernel providers; None for those of this process.
        bridge: whether to run the probes of the adapters' ledgers, which import the engines.

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
        for found in report.engines:
            if bridge and found.version:
                _bridge(report, adapters[found.name])
    return report


def _bridge(report: Report, adapter: EngineAdapter) -> None:
    """What the probes of an adapter's ledger find."""
    for touch in adapter.ledger():
        probed = Probed(adapter.name, touch.what, touch.since, touch.until, touch.verdict(), touch.needed)
        report.bridge.append(probed)
        if probed.needed and probed.verdict != "here":
            advice = "use a release of the engine that this release of taut was made for"
            report.add("wrong", adapter.name, f"{probed.verdict}: {probed.what}", advice)


def _settings(report: Report, environment: Mapping[str, str]) -> Settings:
    """The settings that are right; each that is wrong becomes a finding, where an engine would stop at the first."""
    given = {name: environment[name] for name in sorted(environment) if name.startswith(PREFIX)}
    wrong = {name: says for name, value in given.items() if (says := _what_is_wrong(name, value))}
    for name, says in wrong.items():
        report.add("wrong", "settings", says, f"correct or unset {name}: every engine stops at it")
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
    first, last = adapter.releases
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
            report.add(
                "note",
                adapter.name,
                f"release {version} is not within {first} to {last}, for which taut was made",
                "it may work: taut probes what it touches and says what it misses",
            )
        if not adapter.serves:
            advice = f"leave TAUT_ATTENTION unset for {adapter.name}, or use another engine"
            report.add("note", adapter.name, f"this release of taut does not yet serve {adapter.name}", advice)
        if entry_point and not let_through:
            report.add(
                "wrong",
                adapter.name,
                f"{adapter.plugin_filter}={listed} keeps {adapter.name} from loading the plugin taut",
                f"add taut to the list, separated by commas without spaces, or unset {adapter.plugin_filter}",
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


def _entry_point(report: Report, adapter: EngineAdapter, *, installed: bool) -> bool:
    """Whether the engine finds our plugin and can load it: engines hide what goes wrong there."""
    level: Level = "wrong" if installed else "note"
    ours = [p for p in importlib.metadata.entry_points(group=adapter.plugin_group) if p.value.startswith("taut.")]
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
        says = f"the plugin {ours[0].value} does not load: {type(error).__name__}: {error}"
        report.add(level, adapter.name, says, f"reinstall {DISTRIBUTION}")
        return False
    return True


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
    """The providers, asked plugin by plugin, so that one that fails is known by its name."""
    points = {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}

    def origin(plugin: str) -> str:
        if plugin == "taut":
            return "built in"
        point = points.get(plugin)
        package = f" of {point.dist.name} {point.dist.version}" if point and point.dist else ""
        return f"entry point {plugin}{package}"

    for plugin, failure in kernels.failures.items():
        advice = "update or uninstall its package; the other providers serve"
        report.add("wrong", "providers", f"the {origin(plugin)} did not load: {failure}", advice)
    for hook in reversed(kernels.plugins.hook.taut_kernels.get_hookimpls()):
        where = origin(hook.plugin_name)
        brought, failure = _brought_by(hook)
        report.providers += [_provider(provider, where) for provider in brought]
        if failure:
            says = f"the {where} failed when asked what it provides: {failure}"
            report.add("wrong", "providers", says, "update or uninstall its package: no kernels are found with it")
    report.providers.sort(key=lambda provider: (-provider.priority, provider.name))


def _brought_by(hook: HookImpl) -> tuple[Sequence[KernelProvider], str]:
    """What a plugin provides, or why it does not say."""
    try:
        return list(cast("Sequence[KernelProvider]", hook.function())), ""
    except Exception as error:  # a stranger's code
        return (), f"{type(error).__name__}: {error}"


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
    numbers = [tuple(map(int, re.findall(r"\d+", v.split("+")[0])[:3])) for v in (releases[0], version, releases[1])]
    return numbers[0] <= numbers[1] <= numbers[2]


def _tidy(text: str) -> str:
    """One line, with the home folder as `~`: a report is pasted in public."""
    home = str(Path.home())
    text = " ".join(text.split())
    return text.replace(home, "~") if len(home) > 1 else text


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


def as_json(report: Report) -> str:
    """The report for programs. Its keys are listed in the command's help and stay."""
    return json.dumps(_plain(report), indent=2)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def render(report: Report) -> Group:
    """The report for people."""
    torch = f"{report.torch.version}, {report.torch.build}" if report.torch else "missing"
    parts: list[Any] = [
        Text(f"taut {report.taut}   python {report.python}   {report.platform}", style="bold"),
        Text(f"torch {torch}   triton {report.triton or 'missing'}   GPUs {len(report.gpus)}"),
        _table(
            "Engines",
            ("engine", "installed", "made for", "serves", "plugin"),
            [
                (
                    engine.name,
                    f"{engine.distribution or ''} {engine.version}".strip() if engine.version else "no",
                    " to ".join(engine.releases),
                    ", ".join(engine.serves) or "nothing yet",
                    ("found" if engine.let_through else "filtered out") if engine.entry_point else "not found",
                )
                for engine in report.engines
            ],
        ),
    ]
    rows: list[tuple[str, ...]]
    if report.gpus:
        rows = [(str(gpu.index), gpu.name, gpu.target, f"{gpu.memory_gib} GiB") for gpu in report.gpus]
        parts.append(_table("GPUs", ("", "name", "target", "memory"), rows))
    rows = [(setting.name, setting.value or "unset", setting.source) for setting in report.settings]
    parts.append(_table("Settings", ("setting", "value", "from"), rows))
    parts.append(
        _table(
            "Kernel providers",
            ("provider", "priority", "summary", "from", "by itself on"),
            [(p.name, str(p.priority), p.summary, p.origin, ", ".join(p.automatic_on)) for p in report.providers],
        )
    )
    parts += [_capabilities(provider) for provider in report.providers]
    if report.model:
        parts += _render_model(report.model)
    if report.bridge:
        rows = [(p.engine, f"{p.since} to {p.until or 'now'}", p.verdict, p.what) for p in report.bridge]
        parts.append(_table("Bridge", ("engine", "releases", "here", "what"), rows))
    findings = Table(title="Findings", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "about", "finding"):
        findings.add_column(column, overflow="fold")
    for finding in sorted(report.findings, key=lambda f: list(STYLES).index(f.level)):
        says = Text(finding.says)
        if finding.advice:
            says.append(f"\n-> {finding.advice}", style="italic")
        findings.add_row(Text(finding.level, style=STYLES[finding.level]), Text(finding.about), says)
    parts.append(findings)
    wrong = sum(finding.level == "wrong" for finding in report.findings)
    parts.append(Text(f"{wrong} wrong" if wrong else "Nothing is wrong.", style=STYLES["wrong" if wrong else "ok"]))
    return Group(*parts)


def _capabilities(provider: Provider) -> Table:
    """What a provider can do: operations that can do the same share a row, a limit that is not set takes no space."""
    limits = ("dtypes", "cache_dtypes", "head_sizes", "value_sizes", "page_sizes", "max_query", "max_q_heads")

    def words(value: Any) -> str:
        return ", ".join(map(str, sorted(value))) if isinstance(value, frozenset) else str(value)

    rows: dict[str, list[str]] = {}
    for c in provider.capabilities:
        set_limits = [(name.replace("_", " "), getattr(c, name)) for name in limits if getattr(c, name) is not None]
        lines = [f"on {', '.join(c.targets)}", *(f"{name}: {words(value)}" for name, value in set_limits)]
        if c.operation in MASKED:
            lines.append(f"features: {words(c.features) or 'none'}")
        rows.setdefault("\n".join(lines), []).append(c.operation)
    title = f"What {provider.name} can do"
    return _table(title, ("operation", "with"), [("\n".join(names), can) for can, names in rows.items()])


def _render_model(model: Model) -> list[Table]:
    rows = []
    for one in model.asked:
        p = one.problem
        against = "\n".join(f"{name}: {'; '.join(reasons)}" for name, reasons in one.reasons.items())
        shape = f"heads {p.q_heads}/{p.kv_heads}, size {p.head_size}/{p.value_size}, {p.dtype}"
        asks = ", ".join([shape, *sorted(p.features)])
        rows.append((p.operation, asks, one.provider or "nobody", against or "-"))
    title = f"Model: {model.model_type} ({model.kind}) on {model.target}"
    tables = [_table(title, ("asks for", "with", "served by", "not by"), rows)]
    for engine, outcomes in model.outcomes.items():
        tables.append(_table(f"This model in {engine}", ("TAUT_ATTENTION", "gives"), list(outcomes.items())))
    return tables


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # Text: a stranger's [brackets] are no markup
    return table


def read_model(place: Path) -> dict[str, Any]:
    """The config of a model: a `config.json`, or the folder that holds it.

    Raises:
        FileNotFoundError: there is none.
        UserError: it is not a config.
    """
    file = place / "config.json" if place.is_dir() else place
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"--model {place}: {file.name} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"--model {place}: {file.name} holds no model's config, which is an object with keys")
    return config


def command(
    model: Annotated[
        Path | None, typer.Option(help="A model's folder, or its config.json: who would serve it, and why.")
    ] = None,
    engine: Annotated[str | None, typer.Option(help="Look for this engine only: vllm, sglang.")] = None,
    target: Annotated[
        str | None, typer.Option(help="Judge for this device instead of the one here: cpu, sm_90, gfx942.")
    ] = None,
    bridge: Annotated[
        bool, typer.Option("--bridge", help="Hold our ledger of the engine's internals against it; imports the engine.")
    ] = False,
    as_data: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Say what is installed, what would serve, and why. Exit status 1 if anything is wrong.

    The keys of --json, which stay: taut, python, platform, torch (version, build; null where it is missing), triton,
    gpus, engines, providers (with their capabilities), settings, model (null without --model), bridge (empty without
    --bridge), and findings (level: ok, note or wrong; about; says; advice).
    """
    logging.getLogger("taut").addHandler(logging.NullHandler())  # what would be logged stands among the findings
    config = None if model is None else read_model(model)
    report = collect(engine=engine, model=config, target=target, bridge=bridge)
    if as_data:
        typer.echo(as_json(report))
    else:
        Console().print(render(report))
    if report.wrong:
        raise typer.Exit(1)
