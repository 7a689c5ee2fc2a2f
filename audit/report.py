"""One audit: what was asked, the runs, and what was made of them. It is what `taut audit --json` prints.

A field is added without a new `SCHEMA`; one that changes its meaning or goes makes a new one.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

import taut
from taut.audit.records import Run
from taut.audit.verdict import Summary, summary

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from taut.audit.work import Request

SCHEMA = 1


class ReportError(ValueError):
    """What was read is no report, or one of another schema; the message says why."""


@dataclass
class Report:
    """Runs of the same work with one backend each, a summary of each, and what failed, as sentences."""

    work: dict[str, Any]
    runs: list[Run]
    judged: list[Summary]
    failed: list[str] = field(default_factory=list)
    taut: str = taut.__version__

    @classmethod
    def of(cls, request: Request, runs: Sequence[Run], phase: str) -> Report:
        """A report of what has just run, its steps of one phase judged."""
        names = ("engine", "rows", "context", "steps", "layers", "made_up", "options")
        work = {name: getattr(request, name) for name in names}
        work["model"] = Path(request.model).name  # a machine's folders are nobody's business in a report
        return cls(work, list(runs), [summary(run, phase) for run in runs])

    @property
    def each(self) -> Iterator[tuple[Run, Summary]]:
        """Each run with its summary."""
        return zip(self.runs, self.judged, strict=True)

    def as_json(self) -> str:
        """The report as docs/audit.md describes it. Of the steps of a run the last of each kind keeps its events."""
        runs = []
        for run, judged in self.each:
            record = asdict(run)
            last = {step["kind"]: step for step in record["steps"]}
            for step in record["steps"]:
                if step is not last[step["kind"]]:
                    del step["scopes"]
            runs.append(record | {"summary": asdict(judged)})
        whole = {"schema": SCHEMA, "taut": self.taut, "work": self.work, "runs": runs, "failed": self.failed}
        return json.dumps(whole, indent=1)


def read_report(file: Path) -> Report:
    """The report in a file that `Report.as_json` has printed, in this release or an earlier one.

    Raises:
        ReportError: it is something else, or of a later release.
    """
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        judged = TypeAdapter(list[Summary]).validate_python([run.pop("summary") for run in told["runs"]])
        runs = TypeAdapter(list[Run]).validate_python(told["runs"])
        report, schema = Report(told["work"], runs, judged, taut=told["taut"]), told["schema"]
    except (ValueError, KeyError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ReportError(f"{file} is no report that `taut audit --json` has printed: {reason}") from None
    if schema != SCHEMA:
        raise ReportError(f"{file} is a report of schema {schema}; this release of taut reads {SCHEMA}")
    return report
