"""Several methods on one task: the table and the picture of their finished runs."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zo_fused.task.errors import UserError, first_line, optional
from zo_fused.task.history import Entry, accuracies, read_history, spent

COLUMNS = (
    "method",
    "lr",
    "steps",
    "forward passes",
    "test accuracy",
    "best dev accuracy",
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
    except (OSError, ValueError) as error:
        raise UserError(f"can't read the run in {directory}: {first_line(error)}") from error
    return Outcome(method, seed, summary, read_history(directory / "history.jsonl"))


def by_method(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """The outcomes of each method, in the order of their first ones."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.method, []).append(outcome)
    return groups


def summarize(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """A row for each method, as JSON types: means over its runs, and the range of accuracies.

    Times are those of training steps, without evaluations.
    """
    rows = []
    for method, runs in by_method(outcomes).items():
        first = runs[0].summary
        seconds = [sum(e["seconds"] for e in run.history if "seconds" in e) for run in runs]
        peaks = [run.summary["peak_memory_bytes"] for run in runs]
        best = [max(dict(accuracies(run.history, "dev")).values(), default=None) for run in runs]
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
            f"{1000 * row['seconds_per_forward']:.2f}",
            f"{row['seconds']:.1f}",
            "-" if peak is None else f"{peak / 2**20:.0f} MiB",
            f"{row['state_bytes_per_parameter']:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(outcomes: Sequence[Outcome], title: str, path: Path) -> None:
    """Writes the picture: dev accuracy against forward passes and against seconds of training.

    Lines are means over seeds, bands reach from the lowest to the highest.
    """
    figure_type = optional("matplotlib.figure").Figure
    figure = figure_type(figsize=(9.6, 4.4), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    figure.suptitle(title, fontsize=11)
    for axes, (name, label) in zip(
        panels,
        (("forwards", "training forward passes over a batch"), ("seconds", "seconds of training")),
        strict=True,
    ):
        for number, (method, runs) in enumerate(by_method(outcomes).items()):
            _draw_line(axes, runs, name, f"C{number}", method)
        axes.set_xlabel(label)
        axes.grid(color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("dev accuracy")
    panels[0].yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    handles, labels = panels[0].get_legend_handles_labels()
    columns = max(1, min(4, 120 // (8 + max(map(len, labels)))))  # of as many letters as fit
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)


def _draw_line(axes: Any, runs: Sequence[Outcome], name: str, color: str, label: str) -> None:
    steps = [step for step, _ in accuracies(runs[0].history, "dev")]
    costs = [spent(run.history, name) for run in runs]
    values = [dict(accuracies(run.history, "dev")) for run in runs]
    at = [mean([cost[step] for cost in costs]) for step in steps]
    seen = [[value[step] for value in values] for step in steps]
    axes.plot(at, [mean(v) for v in seen], "o-", color=color, markersize=3, label=label)
    low, high = [min(v) for v in seen], [max(v) for v in seen]
    axes.fill_between(at, low, high, color=color, alpha=0.15, linewidth=0)
