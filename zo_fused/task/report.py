"""What a run reports: a table, ``summary.json`` and ``curve.png``."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import zo_fused
from zo_fused.sweeps.backends import cpu
from zo_fused.task.errors import optional
from zo_fused.task.history import Entry, History

PHASES = ("perturb", "forward", "update")


def peak_memory(device: torch.device) -> int | None:
    """Peak bytes allocated on a GPU, or resident in the process; None where that is unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def place(device: torch.device, dtype: str) -> str:
    """What a run's weights are, and what serves them, in a line."""
    backend = zo_fused.backend_of(device)
    how = f"backend {backend}" + (f" ({cpu.isa()})" if backend == "cpu" else "")
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return f"device {device}{name}{threads}, {how}, weights in {dtype}"


def sizes(counts: Mapping[str, int], cut: Mapping[str, int], max_length: int) -> str:
    """How many examples a run has, in a line, and how many of their prompts lost tokens."""
    text = "examples: " + ", ".join(f"{count} {split}" for split, count in counts.items())
    lost = _cut(cut)
    return f"{text}; prompts cut on the left to {max_length} tokens: {lost}" if lost else text


def _cut(cut: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {split}" for split, number in cut.items() if number)


def summarize(
    history: History, timings: dict[str, float], measured_steps: int, memory: int | None
) -> dict[str, Any]:
    """The run in numbers, all times in seconds.

    Args:
        history: of the whole run.
        timings: seconds by phase, as the optimizer collects them.
        measured_steps: steps that `timings` covers, the last ones: a resumed run has others.
        memory: peak bytes or None.
    """
    steps = [entry for entry in history.entries if "projected_grad" in entry]
    measured = steps[len(steps) - measured_steps :]
    share = 1 / max(1, measured_steps)
    seconds = {"total": sum(entry["seconds"] for entry in measured) * share}
    seconds |= {phase: timings.get(phase, 0.0) * share for phase in PHASES}
    f1 = _before_and_after(history, "f1")  # where the model writes answers
    return {
        "steps": len(steps),
        "forwards": sum(entry["forwards"] for entry in steps),
        "skipped_steps": sum(map(_skipped, steps)),
        "accuracy": _before_and_after(history, "accuracy"),
        **({"f1": f1} if f1 else {}),
        "seconds_per_step": seconds,
        "peak_memory_bytes": memory,
    }


def _before_and_after(history: History, measure: str) -> dict[str, dict[str, float | None]]:
    """The first and the last evaluation of each split, if they are of the first and last step."""
    found: dict[str, dict[str, float | None]] = {}
    for split in ("dev", "test"):
        points = history.accuracies(split, measure)
        if points:
            first, last = points[0], points[-1]
            found[split] = {
                "before": first[1] if first[0] == 0 else None,
                "after": last[1] if last[0] > 0 else None,
            }
    return found


def _skipped(entry: Entry) -> bool:
    grads = entry["projected_grad"]
    several = grads if isinstance(grads, list) else [grads]
    return not all(grad is not None and abs(grad) < float("inf") for grad in several)


def table(summary: dict[str, Any]) -> str:
    """The summary as aligned lines."""
    rows: list[tuple[str, str]] = []
    f1 = summary.get("f1", {})
    for measure, splits in (("F1", f1), ("exact" if f1 else "accuracy", summary["accuracy"])):
        for split, values in splits.items():
            before, after = (_accuracy(values[name]) for name in ("before", "after"))
            rows.append((f"{split} {measure}", f"{before} -> {after}"))
    seconds = summary["seconds_per_step"]
    rows.append(("time per step", _time(seconds["total"])))
    rows += [(f"  {phase}", _time(seconds[phase])) for phase in PHASES]
    rows.append(("  other", _time(seconds["total"] - sum(seconds[p] for p in PHASES))))
    if summary["peak_memory_bytes"] is not None:
        rows.append(("peak memory", f"{summary['peak_memory_bytes'] / 2**20:.0f} MiB"))
    rows.append(("steps", f"{summary['steps']}"))
    if summary["skipped_steps"]:
        rows.append(("  skipped", f"{summary['skipped_steps']} (loss not finite)"))
    rows.append(("forward passes", f"{summary['forwards']}"))
    cut = _cut(summary.get("cut_prompts", {}))
    if cut:
        rows.append(("prompts cut", cut))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _accuracy(value: float | None) -> str:
    return "?" if value is None else f"{value:.3f}"


def _time(seconds: float) -> str:
    return f"{seconds * 1000:8.2f} ms"


def smooth(values: list[float], window: int) -> list[float]:
    """Centred moving average; near the ends the window shrinks to what is there."""
    half = window // 2
    total = [0.0]
    for value in values:
        total.append(total[-1] + value)
    spans = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [(total[high] - total[low]) / (high - low) for low, high in spans]


def draw(history: History, title: str, path: Path) -> None:
    """Writes the picture of a run: training loss above, accuracies below."""
    figure_type = optional("matplotlib.figure").Figure  # no pyplot: no global state, no display
    figure = figure_type(figsize=(7.2, 5.6), dpi=150, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    figure.suptitle(title, fontsize=11)
    _draw_loss(above, history)
    _draw_accuracy(below, history)
    for axes in (above, below):
        axes.grid(color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)


def _draw_loss(axes: Any, history: History) -> None:
    points = [(s, x) for s, x in history.losses() if x is not None and abs(x) < float("inf")]
    axes.set_ylabel("training loss")
    if not points:
        return
    steps, losses = [s for s, _ in points], [x for _, x in points]
    window = max(1, len(losses) // 20)
    axes.plot(steps, losses, color="C0", alpha=0.25, linewidth=0.8, label="each step")
    label = f"mean of {2 * (window // 2) + 1} steps"
    axes.plot(steps, smooth(losses, window), color="C0", linewidth=1.8, label=label)
    # a few outliers should not flatten the curve
    ordered = sorted(losses)
    low, high = ordered[0], ordered[min(len(ordered) - 1, int(0.995 * len(ordered)))]
    margin = 0.05 * (high - low) or 0.05
    axes.set_ylim(low - margin, high + margin)
    axes.legend(frameon=False, fontsize=9, loc="upper right")


def _draw_accuracy(axes: Any, history: History) -> None:
    axes.set_ylabel("accuracy")
    axes.set_xlabel("step")
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    styles = {"dev": ("C1", "o-", 4), "test": ("C2", "D", 7)}
    levels = []
    for split, (color, style, size) in styles.items():
        points = history.accuracies(split)
        if not points:
            continue
        steps, values = [s for s, _ in points], [v for _, v in points]
        levels += values
        axes.plot(steps, values, style, color=color, markersize=size, linewidth=1.5, label=split)
        if split == "test" or not history.accuracies("test"):
            # below the first and above the last point, where a rising curve leaves room
            for step, value, side in ((steps[0], values[0], 1), (steps[-1], values[-1], -1)):
                axes.annotate(
                    f"{100 * value:.1f} %",
                    (step, value),
                    xytext=(9 * side, -11 * side),
                    textcoords="offset points",
                    ha="left" if side > 0 else "right",
                    va="center",
                    color=color,
                    fontsize=9,
                )
    if levels:
        low, high = min(levels), max(levels)
        margin = max(0.03, 0.2 * (high - low))
        axes.set_ylim(low - margin, high + margin)
        axes.legend(frameon=False, fontsize=9, loc="lower right")
