"""``gpu.json`` as a Markdown page and two plots. ``python -m bench.gpu.report DIR`` writes them."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from bench.page import Row, table

LOW_RANKS = (1, 2, 4, 8)

# ---- goals --------------------------------------------------------------------------------------


def _best(rows: Iterable[Row], column: str, lowest: bool = False) -> tuple[float, str] | None:
    """The best value of a column, and whose it is."""
    found = [
        (float(row[column]), str(row.get("backend", row.get("who", ""))))
        for row in rows
        if row.get(column) is not None
    ]
    if not found:
        return None
    return min(found) if lowest else max(found)


def goals(data: Mapping[str, Any]) -> list[Row]:
    """Every goal with what was measured, by the better backend; None where it was not."""
    sweeps = [row for row in data.get("sweeps", []) if row["dtype"] == "fp16"]
    steps = [row for row in data.get("steps", []) if not row["rival"]]
    large = [row for row in steps if row["method"] == "MeZO" and row["model"] == "opt-13b"]

    def sweep(name: str) -> tuple[float, str] | None:
        return _best((row for row in sweeps if row["sweep"] == name), "of copy")

    ranks = [sweep(f"low-rank r={rank}") for rank in LOW_RANKS]
    measured = [rank for rank in ranks if rank is not None]
    made: list[tuple[str, str, float, tuple[float, str] | None]] = [
        ("dense sweep, fp16, of copy", ">=", 0.9, sweep("dense")),
        ("dense sweep, hadamard, fp16, of copy", ">=", 0.95, sweep("dense, hadamard")),
        ("dense sweep, fast, fp16, of copy", ">=", 0.95, sweep("dense, fast")),
        (
            "low-rank sweep, fp16, the slowest of r <= 8, of copy",
            ">=",
            0.95,
            min(measured) if len(measured) == len(ranks) else None,
        ),
        (
            "OPT-13B MeZO step, times plain PyTorch",
            ">=",
            10.0,
            _best(large, "times published"),
        ),
        (
            "peak extra memory of a MeZO step, MB",
            "<",
            1.0,
            _megabytes(row for row in steps if row["method"] == "MeZO"),
        ),
    ]
    return [
        {
            "goal": name,
            "wanted": f"{relation} {bound:g}",
            "measured": value and value[0],
            "by": value[1] if value else "",
            "met": None
            if value is None
            else value[0] >= bound
            if relation == ">="
            else value[0] < bound,
        }
        for name, relation, bound, value in made
    ]


def _megabytes(rows: Iterable[Row]) -> tuple[float, str] | None:
    """The worst over models of the better backend's peak."""
    models: dict[str, list[Row]] = {}
    for row in rows:
        models.setdefault(row["model"], []).append(row)
    worst = [_best(group, "peak_extra_bytes", lowest=True) for group in models.values()]
    found = [x for x in worst if x is not None]
    if not found:
        return None
    most, who = max(found)
    return most / 1e6, who


# ---- Markdown -----------------------------------------------------------------------------------


SECTIONS: tuple[tuple[str, str, str, dict[str, str]], ...] = (
    (
        "sweeps",
        "Sweeps",
        "Bytes a sweep must move over the time it takes. `predicted`: from the instructions of the "
        "Triton kernels (`bench/gpu/roofline.py`).",
        {
            "dtype": "weights",
            "sweep": "sweep",
            "backend": "backend",
            "ms": "ms",
            "G elements/s": "G elements/s",
            "GB/s": "GB/s",
            "of copy": "of copy",
            "predicted": "predicted",
            "limit": "predicted limit",
        },
    ),
    (
        "steps",
        "Steps outside the forward passes",
        "Host time from synchronisation to synchronisation, in turns. `of copy`: the time of "
        "copying all weights three times over the time taken.",
        {
            "model": "shapes",
            "dtype": "weights",
            "method": "method",
            "who": "who",
            "ms": "ms",
            "times fastest rival": "times fastest rival",
            "times published": "times published",
            "of copy": "of copy",
            "peak_extra_bytes": "peak extra bytes",
            "repeats": "repeats",
        },
    ),
    (
        "rivals",
        "Rivals of one perturbing sweep",
        "The same fp16 weights, in turns. `compiled` and `foreach`: `bench/rivals.py`.",
        {
            "perturbation": "perturbation",
            "ms": "ms",
            "G elements/s": "G elements/s",
            "of copy": "of copy",
        },
    ),
    (
        "graphs",
        "Three sweeps of MeZO, fp16",
        "`graph`: captured once in a CUDA graph, then replayed.",
        {"model": "shapes", "backend": "backend", "how": "how", "ms": "ms", "repeats": "repeats"},
    ),
    (
        "overhead",
        "Host time of a sweep",
        "As many parameters as the model has, of 16 elements. `waits`: times the host waits for "
        "the device, as far as torch can tell.",
        {
            "model": "parameters of",
            "parameters": "parameters",
            "sweep": "sweep",
            "host us": "host us",
            "kernels": "kernels",
            "waits": "waits",
        },
    ),
    ("errors", "Errors", "", {"section": "section", "error": "error"}),
    ("skipped", "Skipped", "", {"what": "what", "reason": "reason"}),
)


def markdown(data: Mapping[str, Any], plots: Iterable[str]) -> str:
    machine = data["machine"]
    copies = data.get("copy", [])
    lines = [
        f"# zo_fused on {machine['device']}",
        "",
        f"{machine['date']}. zo_fused {machine['zo_fused']}, commit {machine['commit']}; "
        f"driver {machine['driver']}, CUDA {machine['cuda']}, torch {machine['torch']}, "
        f"Triton {machine['triton']}, Python {machine['python']}.",
        "",
        "Copy bandwidth, read and written: "
        + (" GB/s at the start, ".join(f"{row['GB/s']:.4g}" for row in copies) or "not measured")
        + (" GB/s at the end." if len(copies) > 1 else "." if not copies else " GB/s."),
    ]
    for label in ("state at start", "state at end"):
        if machine.get(label):
            lines += ["", f"GPU {label.removeprefix('state ')}: {machine[label]}."]
    if data.get("quick"):
        lines += ["", "**Tiny sizes, to test the script: these numbers mean nothing.**"]
    if data.get("stopped") or not data.get("finished"):
        lines += ["", "**The run was cut short**: what is missing was not measured."]
    lines += ["", "## Goals", ""]
    verdicts = {None: "not measured", True: "met", False: "missed"}
    rows = [{**goal, "met": verdicts[goal["met"]]} for goal in goals(data)]
    heads = {"goal": "goal", "wanted": "wanted", "measured": "measured", "by": "by", "met": "met"}
    lines += table(rows, heads)
    for key, title, note, names in SECTIONS:
        if data.get(key):
            lines += ["", f"## {title}", "", *([note, ""] if note else [])]
            lines += table(data[key], names)
    for plot in plots:
        lines += ["", f"![{Path(plot).stem}]({plot})"]
    return "\n".join(lines) + "\n"


# ---- plots --------------------------------------------------------------------------------------


def _bars(axes: Any, groups: list[str], series: Mapping[str, Mapping[str, float]]) -> None:
    """Horizontal bars with their values: a bunch for every group, a bar for every series."""
    height = 0.8 / max(1, len(series))
    for number, (label, values) in enumerate(series.items()):
        present = [(i, values[g]) for i, g in enumerate(groups) if g in values]
        places = [i + (number - (len(series) - 1) / 2) * height for i, _ in present]
        bars = axes.barh(places, [value for _, value in present], height, label=label)
        axes.bar_label(bars, fmt="%.3g", fontsize=6, padding=2)
    axes.set_yticks(range(len(groups)), groups, fontsize=8)
    axes.invert_yaxis()
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))


def _series(
    rows: Iterable[Row], group: Callable[[Row], str], label: Callable[[Row], str], column: str
) -> tuple[list[str], dict[str, dict[str, float]]]:
    groups: dict[str, None] = {}
    series: dict[str, dict[str, float]] = {}
    for row in rows:
        groups[group(row)] = None
        series.setdefault(label(row), {})[group(row)] = row[column]
    return list(groups), series


def draw(data: Mapping[str, Any], directory: Path) -> list[str]:
    """Writes the plots that there is data for; their names."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    title = data["machine"]["device"]
    written = []
    if data.get("sweeps"):
        groups, series = _series(
            data["sweeps"],
            lambda row: row["sweep"],
            lambda row: f"{row['backend']} {row['dtype']}",
            "of copy",
        )
        figure, axes = pyplot.subplots(figsize=(9, 1 + 0.1 * len(groups) * (2 + len(series))))
        _bars(axes, groups, series)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xlabel("fraction of copy bandwidth")
        axes.set_title(f"Sweeps, {title}")
        figure.tight_layout()
        figure.savefig(directory / "sweeps.png", dpi=110)
        pyplot.close(figure)
        written.append("sweeps.png")
    if data.get("steps"):
        groups, series = _series(
            data["steps"],
            lambda row: f"{row['model']} {row['method']}",
            lambda row: row["who"],
            "ms",
        )
        figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.5 * len(groups)))
        _bars(axes, groups, series)
        axes.set_xscale("log")
        fastest = min(value for values in series.values() for value in values.values())
        axes.set_xlim(left=10 ** math.floor(math.log10(fastest)))
        axes.set_xlabel("ms a step outside the forward passes")
        axes.set_title(f"Steps, {title}")
        figure.tight_layout()
        figure.savefig(directory / "steps.png", dpi=110)
        pyplot.close(figure)
        written.append("steps.png")
    return written


def write(directory: Path, plots: bool = True) -> None:
    """The page and the plots beside ``gpu.json``; without matplotlib, the page alone."""
    data = json.loads((directory / "gpu.json").read_text(encoding="utf-8"))
    drawn: list[str] = []
    try:
        drawn = draw(data, directory) if plots else []
    except ImportError as error:
        data.setdefault("skipped", []).append({"what": "plots", "reason": str(error)})
    (directory / "gpu.md").write_text(markdown(data, drawn), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
