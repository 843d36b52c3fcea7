"""The picture of a comparison: one panel a method, so that a dozen can be told apart."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zo_fused.task.comparison import Curve, Outcome, by_method, curve, speed
from zo_fused.task.errors import optional
from zo_fused.task.history import accuracies

_COLUMNS = 5
_OTHERS, _OWN, _BASE = "0.82", "C0", "0.25"


def draw(outcomes: Sequence[Outcome], title: str, path: Path) -> None:
    """Writes the picture: dev loss against forward passes.

    In each panel one method is blue: its mean over seeds, and a band from the lowest to the
    highest. The first method is dashed in all panels, the others are grey. The last panel has the
    dev accuracies at the end.
    """
    groups = by_method(outcomes)
    rows = -(-len(groups) // _COLUMNS)
    heights = 1.6 * rows + 0.5, 0.2 * len(groups) + 0.7
    figure_type = optional("matplotlib.figure").Figure
    figure = figure_type(figsize=(9.6, sum(heights) + 0.3), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=11)
    above, below = figure.subfigures(2, 1, height_ratios=heights)
    _draw_losses(above, {method: curve(runs) for method, runs in groups.items()}, rows)
    _draw_accuracies(below.subplots(), groups)
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)


def _draw_losses(figure: Any, curves: dict[str, Curve], rows: int) -> None:
    columns = min(_COLUMNS, len(curves))
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    base = next(iter(curves.values()))
    for axes, (method, made) in zip(panels.flat, curves.items(), strict=False):
        for other in curves.values():
            axes.plot(other.at, other.mean, color=_OTHERS, linewidth=0.8, zorder=1)
        axes.plot(base.at, base.mean, "--", color=_BASE, linewidth=1.0, zorder=2)
        axes.plot(made.at, made.mean, color=_OWN, linewidth=1.8, zorder=3)
        axes.fill_between(made.at, made.low, made.high, color=_OWN, alpha=0.2, linewidth=0)
        found = None if made is base else speed(made, base)
        told = "" if found is None else f"  {found:.2g}x"
        axes.set_title(_wrapped(method) + told, fontsize=8)
        axes.tick_params(labelsize=7)
        _tidy(axes)
    axes.set_ylim(*_limits(list(curves.values())))
    for unused in panels.flat[len(curves) :]:
        unused.set_visible(False)
    for axes in panels.flat[max(0, len(curves) - columns) : len(curves)]:
        axes.tick_params(labelbottom=True)
    figure.supylabel("dev loss", fontsize=9)
    figure.supxlabel("training forward passes over a batch", fontsize=9)


def _wrapped(method: str) -> str:
    """A method, with its options below."""
    name, _, given = method.partition(":")
    return f"{name}\n{given.replace(':', ', ')}" if given else name


def _limits(curves: Sequence[Curve]) -> tuple[float, float]:
    """From the lowest loss to a little above the start: what diverges leaves the panel."""
    values = [v for made in curves for v in made.mean if math.isfinite(v)]
    starts = [made.mean[0] for made in curves if made.mean and math.isfinite(made.mean[0])]
    low, start = min(values, default=0.0), max(starts, default=1.0)
    margin = 0.08 * (start - low) or 0.05
    return low - margin, start + 2 * margin


def _draw_accuracies(axes: Any, groups: dict[str, list[Outcome]]) -> None:
    """A line a method: its seeds, and their mean."""
    for row, runs in enumerate(groups.values()):
        ends = [found[-1][1] for run in runs if (found := accuracies(run.history, "dev"))]
        axes.plot(ends, [row] * len(ends), "|", color=_OWN, markersize=8)
        if ends:
            axes.plot([sum(ends) / len(ends)], [row], "o", color=_OWN, markersize=4)
    axes.set_yticks(range(len(groups)), list(groups), fontsize=7)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.tick_params(labelsize=7)
    axes.set_xlabel("dev accuracy at the end: seeds and their mean", fontsize=9)
    _tidy(axes)


def _tidy(axes: Any) -> None:
    axes.grid(color="0.93", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
