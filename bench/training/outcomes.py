"""What the runs of a protocol came to, in a file beside the page: a method can be added to a page
without the runs of the others."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from zo_fused.task.comparison import Outcome
from zo_fused.task.history import Entry

_USED = ("accuracy", "forwards", "parameters", "peak_memory_bytes", "state_bytes", "steps")


@dataclass(frozen=True)
class Result:
    """One method on a task."""

    commit: str  # of the code
    rates: dict[str, float]  # learning rate -> dev loss at the end; infinity if it diverged
    runs: list[Outcome]  # with the best rate, a seed each


def thin(outcome: Outcome) -> Outcome:
    """What tables and pictures need of an outcome: its evaluations, and the steps between two of
    them as one entry with their forward passes and seconds."""
    entries: list[Entry] = []
    forwards, seconds = 0, 0.0
    for entry in outcome.history:
        if "forwards" in entry:
            forwards, seconds = forwards + entry["forwards"], seconds + entry["seconds"]
            continue
        if forwards:
            passed = {"step": entry["step"], "forwards": forwards, "seconds": round(seconds, 3)}
            entries.append(passed)
            forwards, seconds = 0, 0.0
        entries.append(entry)
    summary = {key: outcome.summary[key] for key in _USED}
    summary["settings"] = {"lr": outcome.summary["settings"]["lr"]}
    return Outcome(outcome.method, outcome.seed, summary, entries)


def read(path: Path) -> dict[str, Result]:
    """The results of a file, by method; none if there is no file."""
    if not path.exists():
        return {}
    return {
        method: Result(
            kept["commit"],
            {rate: math.inf if loss is None else loss for rate, loss in kept["rates"].items()},
            [Outcome(method, **run) for run in kept["runs"]],
        )
        for method, kept in json.loads(path.read_text(encoding="utf-8")).items()
    }


def write(path: Path, results: dict[str, Result]) -> None:
    """Writes the file, a line a run."""
    lines = []
    for method, result in results.items():
        rates = {rate: loss if math.isfinite(loss) else None for rate, loss in result.rates.items()}
        runs = ",\n  ".join(_line(run) for run in result.runs)
        head = f'"commit": {json.dumps(result.commit)}, "rates": {json.dumps(rates)}'
        lines.append(f'{json.dumps(method)}: {{{head}, "runs": [\n  {runs}]}}')
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _line(run: Outcome) -> str:
    fields: dict[str, Any] = asdict(thin(run))
    del fields["method"]
    return json.dumps(fields, separators=(",", ":"))


def of_all(results: Sequence[Result]) -> list[Outcome]:
    """All runs, one method after the other."""
    return [run for result in results for run in result.runs]
