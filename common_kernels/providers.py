"""The public names of `provider`, which describes one, and of `registry`, which holds them all and chooses.

A provider of your own, in a package of its own:

    # my_kernels.py                                                      # pyproject.toml
    from taut.common_kernels.providers import KernelProvider, hookimpl   # [project.entry-points.taut]
                                                                         # my_kernels = "my_kernels"
    @hookimpl
    def taut_kernels():
        return [KernelProvider(name="mine", ..., contract=1)]
"""

from __future__ import annotations

from taut.common_kernels.provider import GROUP, HookSpecs, KernelProvider, hookimpl
from taut.common_kernels.registry import Choice, ProviderError, Registry, default_registry, registry

__all__ = [
    "GROUP",
    "Choice",
    "HookSpecs",
    "KernelProvider",
    "ProviderError",
    "Registry",
    "default_registry",
    "hookimpl",
    "registry",
]
