"""All providers of a process, and the choice among them.

Providers are found through pluggy: the package's own ones and any installed package with an entry point in the group
`taut`. A choice is made once per problem and keeps the reasons against every other provider, so that it can be printed.
"""

from __future__ import annotations

import difflib
import logging
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

import pluggy

from taut.common_kernels import builtin
from taut.common_kernels.kernels import CONTRACT
from taut.common_kernels.provider import GROUP, HookSpecs, KernelProvider

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from importlib.metadata import EntryPoint

    from taut.common_kernels.problem import Problem

log = logging.getLogger("taut.providers")


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
                if provider.contract != CONTRACT:
                    raise ProviderError(_other_contract(provider))
        except Exception as error:  # a stranger's code, as in `default_registry`
            self.fail(name, getattr(plugins[name], "__name__", repr(plugins[name])), error)
            return []
        return found

    def fail(self, name: str, value: str, error: Exception) -> None:
        """Tell that a plugin is of no use, remember why, and take it out."""
        if self.plugins.has_plugin(name):
            self.plugins.unregister(name=name)
        refused = isinstance(error, ProviderError)  # by us, in words for people
        self.failures[name] = why = str(error) if refused else f"{type(error).__name__}: {error}"
        trace = None if refused else error
        log.error("the kernel provider %s (%s) did not load, others serve: %s", name, value, why, exc_info=trace)

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


def _other_contract(provider: KernelProvider) -> str:
    update = "update taut-attention, or " if provider.contract > CONTRACT else ""
    return (
        f"the provider {provider.name!r} was written for version {provider.contract} of the kernels' contract, this "
        f"taut-attention has version {CONTRACT}: {update}install a release of its package for version {CONTRACT}"
    )


def _nobody(problem: Problem, wanted: str, reasons: Mapping[str, Iterable[str]]) -> str:
    asked = [f"{name}: {'; '.join(against)}" for name, against in reasons.items() if wanted in ("auto", name)]
    advice = "Set TAUT_KERNELS=auto to let another provider serve" if wanted != "auto" else "Set TAUT_ATTENTION=auto"
    return (
        f"no kernels for {problem}. "
        + ". ".join(asked)
        + f". {advice}, or leave this model to the engine with TAUT_ATTENTION=off."
    )


def default_registry(points: Iterable[EntryPoint]) -> Registry:
    """A registry of the built-in providers and of those that entry points bring.

    Args:
        points: the entry points to load. One that does not load is logged as an error and remembered in
            `Registry.failures`; asking for it by name fails with that reason.
    """
    plugins = pluggy.PluginManager(GROUP)
    plugins.add_hookspecs(HookSpecs)
    plugins.register(builtin, name="taut")
    registry = Registry(plugins)
    for point in points:
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
    """The registry of this process, made on first use, with the entry points of every installed package."""
    global _registry
    if _registry is None:
        _registry = default_registry(entry_points(group=GROUP))
    return _registry
