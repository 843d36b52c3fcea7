"""Several methods on one task: what their finished runs came to, in a table."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zo_fused.task.errors import UserError, first_line
from zo_fused.task.history import Entry, accuracies, losses, read_history, spent

COLUMNS = (
    "method",
    "lr",
    "steps",
    "forward passes",
    "test accuracy",
    "best dev accuracy",
    "lowest dev loss",
    "speed",
    "ms a forward pass",
    "seconds",
    "peak memory",
    "state bytes a parameter",
)


@dataclass(frozen=True)
class Outcome:
    """What a finished run left."""

    method: str
    seed: int
    summary: dict[str, Any]
    history: list[Entry]


def read_outcome(method: str, seed: int, directory: Path) -> Outcome:
    """The outcome in a run's directory.

    Raises:
        UserError: it can't be read.
    """
    try:
        summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"can't read the run in {directory}: {first_line(error)}") from error
    if not isinstance(summary, dict):
        raise UserError(f"can't read the run in {directory}: its summary.json is no JSON object")
    return Outcome(method, seed, summary, read_history(directory / "history.jsonl"))


def by_method(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """The outcomes of each method, in the order of their first ones."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.method, []).append(outcome)
    return groups


@dataclass(frozen=True)
class Curve:
    """Means over the runs of a method, and their ranges, at every evaluation on dev."""

    at: list[float]  # forward passes spent
    mean: list[float]
    low: list[float]
    high: list[float]


def curve(runs: Sequence[Outcome]) -> Curve:
    """The dev loss of a method's runs."""
    values = [dict(losses(run.history, "dev")) for run in runs]
    costs = [spent(run.history) for run in runs]
    steps = [step for step in values[0] if all(step in value for value in values)]
    seen = [[value[step] for value in values] for step in steps]
    return Curve(
        [mean([cost[step] for cost in costs]) for step in steps],
        [mean(v) for v in seen],
        [min(v) for v in seen],
        [max(v) for v in seen],
    )


def passes_to(made: Curve, level: float) -> float | None:
    """Where a curve of losses first comes down to a level, by interpolation; None: nowhere."""
    before: tuple[float, float] | None = None
    for at, value in zip(made.at, made.mean, strict=True):
        if value <= level:
            if before is None or not math.isfinite(before[1]):
                return at
            share = (before[1] - level) / (before[1] - value)
            return before[0] + share * (at - before[0])
        before = at, value
    return None


def speed(made: Curve, base: Curve) -> float | None:
    """How many times fewer forward passes than `base` a method takes to the same mean dev loss: the
    lowest of the two lowest that both reach. None: one has not left its start."""
    level = max(min(made.mean), min(base.mean))
    ours, theirs = passes_to(made, level), passes_to(base, level)
    return theirs / ours if ours and theirs else None


def summarize(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """A row for each method, as JSON types: means over its runs, and ranges.

    Times are those of training steps, without evaluations. `speed` is relative to the first method.
    """
    rows, base = [], None
    for method, runs in by_method(outcomes).items():
        made = curve(runs)
        base = base or made
        first = runs[0].summary
        seconds = [sum(e["seconds"] for e in run.history if "seconds" in e) for run in runs]
        peaks = [run.summary["peak_memory_bytes"] for run in runs]
        best = [max(dict(accuracies(run.history, "dev")).values(), default=None) for run in runs]
        lowest = [min(dict(losses(run.history, "dev")).values(), default=None) for run in runs]
        test = [run.summary["accuracy"].get("test", {}).get("after") for run in runs]
        rows.append(
            {
                "method": method,
                "seeds": [run.seed for run in runs],
                "lr": first["settings"]["lr"],
                "steps": first["steps"],
                "forwards": first["forwards"],
                "test_accuracy": _range(test),
                "best_dev_accuracy": _range(best),
                "lowest_dev_loss": _range(lowest),
                "speed": speed(made, base) if made.at and base.at else None,
                "seconds_per_forward": mean(seconds) / max(1, first["forwards"]),
                "seconds": mean(seconds),
                "peak_memory_bytes": None if None in peaks else max(peaks),
                "state_bytes_per_parameter": first["state_bytes"] / max(1, first["parameters"]),
            }
        )
    return rows


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


def _range(values: Sequence[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    return {"mean": mean(known), "min": min(known), "max": max(known)} if known else None


def spread(values: dict[str, float] | None) -> str:
    """Mean and range as text."""
    if values is None:
        return "-"
    if values["min"] == values["max"]:
        return f"{values['mean']:.3f}"
    return f"{values['mean']:.3f} ({values['min']:.3f} to {values['max']:.3f})"


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for row in rows:
        peak = row["peak_memory_bytes"]
        cells = (
            row["method"],
            f"{row['lr']:g}",
            f"{row['steps']}",
            f"{row['forwards']}",
            spread(row["test_accuracy"]),
            spread(row["best_dev_accuracy"]),
            spread(row["lowest_dev_loss"]),
            "-" if row["speed"] is None else f"{row['speed']:.2f}",
            f"{1000 * row['seconds_per_forward']:.2f}",
            f"{row['seconds']:.1f}",
            "-" if peak is None else f"{peak / 2**20:.0f} MiB",
            f"{row['state_bytes_per_parameter']:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
