"""A provider of kernels as data, and the hooks by which providers are found and chosen.

Importing this imports no kernels: those of a provider are imported once it has been chosen.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import pluggy

from taut.common_kernels.problem import target_matches

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from taut.common_kernels.kernels import Kernels
    from taut.common_kernels.problem import Capability, Problem

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
        contract: the version of `kernels.CONTRACT` that its kernels were written for, as a number of its own: one that
            says nothing was written for the first.
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
    contract: int = 1

    @cached_property
    def _probed(self) -> tuple[str, ...]:
        return tuple(self.probe())

    @property
    def missing(self) -> list[str]:
        """Those of the required modules that this environment lacks."""
        return [module for module in self.requires if not _importable(module)]

    @cached_property
    def kernels(self) -> Kernels:
        """The provider's operations, imported on first use."""
        return self.load()

    def is_automatic_on(self, target: str) -> bool:
        """Whether an automatic choice may take this provider on `target` ("sm_90")."""
        return any(target_matches(pattern, target) for pattern in self.automatic_on)

    def refusals(self, problem: Problem) -> list[str]:
        """Every reason why this provider cannot serve `problem`, as sentences; empty when it can."""
        if missing := self.missing:
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


def _importable(module: str) -> bool:
    if sys.modules.get(module) is not None:
        return True
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a parent is missing, or is no package
        return False
