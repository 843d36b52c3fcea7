"""Step times as Markdown tables and as a picture, for `step_time`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

BASELINE = "two forwards"


class Quartiles(NamedTuple):
    low: float  # seconds
    median: float
    high: float


class Measured(NamedTuple):
    model: str
    dtype: str
    rows: dict[int, dict[str, Quartiles]]  # by tokens and variant, the share of windows included
    changes: dict[str, float]  # seconds that a new window costs, by variant


def overhead(seconds: float, forwards: float) -> float:
    """Percent beyond the forward passes."""
    return 100 * (seconds / forwards - 1)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}" if abs(seconds) >= 0.1 else f"{1e3 * seconds:.3g}"


def _table(
    found: Measured, cell: Callable[[Quartiles, Mapping[str, Quartiles]], str]
) -> Iterator[str]:
    names = list(next(iter(found.rows.values())))
    yield "| tokens | " + " | ".join(names) + " |"
    yield "|---" * (1 + len(names)) + "|"
    for tokens, row in found.rows.items():
        yield f"| {tokens} | " + " | ".join(cell(row[name], row) for name in names) + " |"


def markdown(found: Measured) -> Iterator[str]:
    """Lines: the steps, their quartiles, the costs of windows."""

    def step(times: Quartiles, row: Mapping[str, Quartiles]) -> str:
        base = row[BASELINE]
        if times is base:
            return _ms(times.median)
        return f"{_ms(times.median)}, {overhead(times.median, base.median):+.0f} %"

    yield f"## {found.model}, {found.dtype}\n"
    yield f"Median ms a step, and how much longer that is than {BASELINE}:\n"
    yield from _table(found, step)
    yield "\nQuartiles, ms:\n"
    yield from _table(found, lambda times, _: f"{_ms(times.low)} to {_ms(times.high)}")
    costs = ", ".join(f"{name} {_ms(cost)}" for name, cost in found.changes.items())
    yield f"\nA new window costs (ms; its share is in the tables): {costs}.\n"


def plot(everything: Sequence[Measured], path: Path) -> None:
    """Overhead against tokens: zo_fused on the left, all on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (12, 4.5 * len(everything))
    figure, grid = pyplot.subplots(len(everything), 2, figsize=size, squeeze=False)
    for found, panels in zip(everything, grid, strict=True):
        sizes = list(found.rows)
        names = [name for name in found.rows[sizes[0]] if name != BASELINE]
        lines = {
            name: [overhead(r[name].median, r[BASELINE].median) for r in found.rows.values()]
            for name in names
        }
        for axes, what in zip(panels, ("zo_fused", "all"), strict=True):
            for number, (name, line) in enumerate(lines.items()):
                ours = name.startswith(("MeZO", "LOZO"))
                if ours or what == "all":
                    style = "o-" if ours else "s--"
                    axes.plot(sizes, line, style, color=f"C{number}", label=name)
            axes.set_xscale("log", base=2)
            axes.set_xticks(sizes, [str(tokens) for tokens in sizes])
            axes.axhline(0, color="black", linewidth=0.8)
            axes.set(xlabel="tokens a batch", ylabel=f"% longer than {BASELINE}")
            axes.set_title(f"{found.model} {found.dtype}: {what}")
            axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
