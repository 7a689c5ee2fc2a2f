"""Who provides kernels, and the choice among them.

Providers are found through pluggy: the package's own ones and any installed package with an entry point in the group
`taut`. Each describes itself as data (`KernelProvider`), its kernels are imported only once it has been chosen. A
choice is made once per problem and keeps the reasons against every other provider, so that it can be printed.

A provider of your own, in a package of its own:

    # my_kernels.py                                          # pyproject.toml
    from taut.common_kernels.providers import hookimpl       # [project.entry-points.taut]
                                                             # my_kernels = "my_kernels"
    @hookimpl
    def taut_kernels():
        return [KernelProvider(name="mine", ...)]
"""

from __future__ import annotations

import difflib
import importlib.util
import logging
import sys
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

import pluggy

from taut.common_kernels.problem import target_matches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from importlib.metadata import EntryPoint

    from taut.common_kernels.kernels import Kernels
    from taut.common_kernels.problem import Capability, Problem

log = logging.getLogger("taut.providers")

GROUP = "taut"
hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@dataclass(frozen=True)
class KernelProvider:
    """One provider of kernels, described as data.

    Args:
        name: what `TAUT_KERNELS` calls it.
        summary: one line for people.
        priority: the higher is asked first when the choice is automatic.
        capabilities: what it can do; an operation may stand there several times.
        load: imports its kernels; called once, when it is first chosen.
        requires: modules that must be importable at run time.
        automatic_on: the targets on which an automatic choice may take it, patterns as in `Capability.targets`;
            elsewhere it must be asked for by name.
        graphs: whether its operations can be captured in a CUDA graph and replayed with other lengths.
        query_limits: numbers of queries of a row up to which one of its kernels serves, and past which another does: a
            warm-up runs steps of each. Empty where its kernels change nowhere.
        probe: looks at what is installed, and gives every reason against it as a sentence; called once, and only where
            nothing else is against it, so that no process imports in vain what the probe does.
    """

    name: str
    summary: str
    priority: int
    capabilities: tuple[Capability, ...]
    load: Callable[[], Kernels]
    requires: tuple[str, ...] = ()
    automatic_on: tuple[str, ...] = ("any",)
    graphs: bool = True
    query_limits: tuple[int, ...] = ()
    probe: Callable[[], Sequence[str]] = tuple

    @cached_property
    def _probed(self) -> tuple[str, ...]:
        return tuple(self.probe())

    @cached_property
    def kernels(self) -> Kernels:
        """The provider's operations, imported on first use."""
        return self.load()

    def is_automatic_on(self, target: str) -> bool:
        """Whether an automatic choice may take this provider on `target` ("sm_90")."""
        return any(target_matches(pattern, target) for pattern in self.automatic_on)

    def refusals(self, problem: Problem) -> list[str]:
        """Every reason why this provider cannot serve `problem`, as sentences; empty when it can."""
        missing = [module for module in self.requires if not _importable(module)]
        if missing:
            packages = " ".join(dict.fromkeys(module.partition(".")[0] for module in missing))
            return [f"needs {' and '.join(missing)}, which this environment lacks: pip install {packages}"]
        per_capability = [c.refusals(problem) for c in self.capabilities if c.operation == problem.operation]
        if not per_capability:
            return [f"does not provide {problem.operation}"]
        return min(per_capability, key=len) or list(self._probed)


class HookSpecs:
    """The hooks that a third party may implement."""

    @hookspec
    def taut_kernels(self) -> Sequence[KernelProvider]:
        """The providers that this plugin brings, as data. Called once per process; import nothing heavy here."""
        raise AssertionError("a specification is never called")

    @hookspec(firstresult=True)
    def taut_choose(
        self,
        problem: Problem,  # noqa: ARG002
        candidates: Sequence[KernelProvider],  # noqa: ARG002
    ) -> KernelProvider | None:
        """Decide an automatic choice: one of `candidates` (best first, all of them can serve), or None to leave it."""
        raise AssertionError("a specification is never called")


class ProviderError(ValueError):
    """No provider can serve what was asked for; the message holds every reason and what to do."""


@dataclass(frozen=True)
class Choice:
    """Which provider serves a problem, and why the others do not.

    Args:
        problem: what was asked for.
        provider: who serves it.
        reasons: provider name to the reasons against it; for those passed over.
    """

    problem: Problem
    provider: KernelProvider
    reasons: Mapping[str, tuple[str, ...]]

    def explain(self) -> str:
        """The choice in one paragraph, for people."""
        lines = [f"{self.problem} -> {self.provider.name}"]
        lines += [f"  not {name}: {'; '.join(reasons)}" for name, reasons in self.reasons.items()]
        return "\n".join(lines)


@dataclass
class Registry:
    """All providers of one process: the built-in ones and those of entry points.

    Args:
        plugins: pluggy's manager; `default_registry` makes the usual one.
        failures: plugins that did not load or could not say what they provide, by the name of their entry point,
            with the error in words.
    """

    plugins: pluggy.PluginManager
    failures: dict[str, str] = field(default_factory=dict)
    _choices: dict[tuple[Problem, str], Choice] = field(default_factory=dict)
    _said: set[str] = field(default_factory=set)

    @cached_property
    def brought(self) -> dict[str, tuple[KernelProvider, ...]]:
        """What each plugin provides, by its name; every plugin is asked once."""
        plugins = {name: plugin for name, plugin in self.plugins.list_name_plugin() if plugin is not None}
        return {name: tuple(self._providers_of(name, plugins)) for name in plugins}

    @cached_property
    def providers(self) -> tuple[KernelProvider, ...]:
        """Every provider, the highest priority first."""
        found: dict[str, KernelProvider] = {}
        for provider in (p for group in self.brought.values() for p in group):
            if provider.name in found:
                raise ProviderError(
                    f"two kernel providers are named {provider.name!r}: "
                    f"uninstall one of the packages that bring them (`taut doctor` lists their entry points)"
                )
            found[provider.name] = provider
        return tuple(sorted(found.values(), key=lambda p: (-p.priority, p.name)))

    def _providers_of(self, name: str, plugins: Mapping[str, object]) -> list[KernelProvider]:
        """What one plugin provides; nothing, aloud, if it cannot say, so that one bad package does not end the rest."""
        others = [plugin for plugin in plugins.values() if plugin is not plugins[name]]
        try:
            found = [p for group in self.plugins.subset_hook_caller("taut_kernels", others)() for p in group]
            for provider in found:
                if not isinstance(provider, KernelProvider):
                    raise TypeError(f"taut_kernels gave {provider!r}, not a KernelProvider")
                if provider.name == "auto":
                    raise ValueError("no provider can be named 'auto'")
        except Exception as error:  # a stranger's code, as in `default_registry`
            self.fail(name, getattr(plugins[name], "__name__", repr(plugins[name])), error)
            return []
        return found

    def fail(self, name: str, value: str, error: Exception) -> None:
        """Tell that a plugin is of no use, remember why, and take it out."""
        if self.plugins.has_plugin(name):
            self.plugins.unregister(name=name)
        self.failures[name] = f"{type(error).__name__}: {error}"
        log.error("the kernel provider %s (%s) did not load; others serve", name, value, exc_info=error)

    def check_name(self, wanted: str) -> None:
        """Raise `ProviderError` with the nearest right spelling unless `wanted` is "auto" or a provider's name."""
        names = ["auto", *(p.name for p in self.providers)]
        if wanted in names:
            return
        if wanted in self.failures:
            raise ProviderError(f"TAUT_KERNELS={wanted}: its entry point did not load: {self.failures[wanted]}")
        near = difflib.get_close_matches(wanted, names, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        failed = f". Entry points that did not load: {', '.join(self.failures)}" if self.failures else ""
        raise ProviderError(
            f"TAUT_KERNELS={wanted} names no kernel provider: {hint}There are {', '.join(names)}{failed}"
        )

    def choose(self, problem: Problem, wanted: str = "auto") -> Choice:
        """The provider that serves `problem`, chosen once and remembered.

        Args:
            problem: what is asked for.
            wanted: "auto", or the name of the only provider that will do.

        Returns:
            The choice with the reasons against every provider that was passed over.

        Raises:
            ProviderError: `wanted` cannot serve it, or, with "auto", nobody can; every reason is in the message.
        """
        key = (problem, wanted)
        if key not in self._choices:
            self._choices[key] = self._choose(problem, wanted)
        return self._choices[key]

    def _choose(self, problem: Problem, wanted: str) -> Choice:
        self.check_name(wanted)
        reasons: dict[str, tuple[str, ...]] = {}
        able: list[KernelProvider] = []
        for provider in self.providers:
            against = provider.refusals(problem)
            if wanted != "auto" and provider.name != wanted:
                against = [f"TAUT_KERNELS={wanted} asks for another"]
            elif wanted == "auto" and not against and not provider.is_automatic_on(problem.target):
                against = [
                    f"is never chosen by itself on {problem.target}: set TAUT_KERNELS={provider.name} to have it there"
                ]
            if against:
                reasons[provider.name] = tuple(against)
            else:
                able.append(provider)
        if not able:
            raise ProviderError(_nobody(problem, wanted, reasons))
        chosen = able[0]
        if wanted == "auto":
            refused = dict(reasons)
            if len(able) > 1:
                chosen, why = self._decide(problem, able)
                reasons |= {p.name: (why,) for p in able if p != chosen}
            self._say_once(problem, chosen, refused)
        choice = Choice(problem, chosen, reasons)
        log.debug(choice.explain())
        return choice

    def _decide(self, problem: Problem, able: Sequence[KernelProvider]) -> tuple[KernelProvider, str]:
        """Of several that can serve the one that does, and what is to be said of the others."""
        chosen = self.plugins.hook.taut_choose(problem=problem, candidates=tuple(able))
        if chosen is None:
            return able[0], f"{able[0].name} comes first"
        if chosen not in able:
            raise ProviderError(
                f"a taut_choose hook took {getattr(chosen, 'name', chosen)!r} for {problem}, "
                f"which is not among its candidates {', '.join(p.name for p in able)}"
            )
        return chosen, f"a taut_choose hook took {chosen.name}"

    def _say_once(self, problem: Problem, chosen: KernelProvider, refused: Mapping[str, tuple[str, ...]]) -> None:
        """Tell which better-ranked providers could not serve, once per provider and reason."""
        for provider in self.providers:
            if provider.priority <= chosen.priority or provider.name not in refused:
                continue
            line = (
                f"{problem.operation}: {chosen.name} serves instead of {provider.name} "
                f"({'; '.join(refused[provider.name])})"
            )
            if line not in self._said:
                self._said.add(line)
                log.info(line)


def _importable(module: str) -> bool:
    if sys.modules.get(module) is not None:
        return True
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a parent is missing, or is no package
        return False


def _nobody(problem: Problem, wanted: str, reasons: Mapping[str, Iterable[str]]) -> str:
    asked = [f"{name}: {'; '.join(against)}" for name, against in reasons.items() if wanted in ("auto", name)]
    advice = "Set TAUT_KERNELS=auto to let another provider serve" if wanted != "auto" else "Set TAUT_ATTENTION=auto"
    return (
        f"no kernels for {problem}. "
        + ". ".join(asked)
        + f". {advice}, or leave this model to the engine with TAUT_ATTENTION=off."
    )


def default_registry(points: Iterable[EntryPoint] | None = None) -> Registry:
    """The registry of a process: built-in providers and those of the entry-point group `taut`.

    Args:
        points: the entry points to load; by default those of every installed package. One that does not load is logged
            as an error and remembered in `Registry.failures`; asking for it by name fails with that reason.
    """
    from taut.common_kernels import builtin

    plugins = pluggy.PluginManager(GROUP)
    plugins.add_hookspecs(HookSpecs)
    plugins.register(builtin, name="taut")
    registry = Registry(plugins)
    for point in entry_points(group=GROUP) if points is None else points:
        # Whatever a stranger's module raises must be told, not die in here.
        try:
            plugin = point.load()
        except Exception as error:
            registry.fail(point.name, point.value, error)
            continue
        if plugins.has_plugin(point.name):
            log.error("the kernel provider %s (%s) was left out: the name is taken", point.name, point.value)
            registry.failures[point.name] = f"{point.value}: another entry point of this name came first"
            continue
        try:
            plugins.register(plugin, name=point.name)
            plugins.check_pending()
        except Exception as error:
            registry.fail(point.name, point.value, error)
    return registry


_registry: Registry | None = None


def registry() -> Registry:
    """The registry of this process, made on first use."""
    global _registry
    if _registry is None:
        _registry = default_registry()
    return _registry
