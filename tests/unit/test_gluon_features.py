"""The probe of Gluon asks for what the kernels use: no release is refused in vain, and none fails within a kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gluon_names import names_used

from taut.common_kernels.gluon_features import GLUON, NEEDED

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gluon_names import Names


def test_the_probe_demands_exactly_what_the_kernels_use() -> None:
    """All of Gluon, which moves from release to release; of other modules only what is used."""
    used = names_used()
    demanded: dict[str, set[Names]] = {
        module: {(names,) if isinstance(names, str) else names for names in needed} for module, needed in NEEDED.items()
    }
    of_gluon = {module: names for module, names in used.items() if module.startswith(GLUON)}
    lacking, unused = beyond(of_gluon, demanded), beyond(demanded, used)
    assert not lacking, f"kernels use what NEEDED lacks: {lacking}"
    assert not unused, f"no kernel uses what NEEDED has: {unused}"


def beyond(some: Mapping[str, set[Names]], others: Mapping[str, set[Names]]) -> str:
    """The names that the first has and the second has not, in words."""
    found = ((module, names) for module in some for names in some[module] - others.get(module, set()))
    return ", ".join(sorted(f"{module}.{' or '.join(names)}" for module, names in found))
