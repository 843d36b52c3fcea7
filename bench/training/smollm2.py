"""SmolLM2-135M on tweets by MeZO, LOZO and AdamW: ``python -m bench.training.smollm2 DIR``.

Written down before the runs. A method succeeds if, within 1,000 forward passes over batches of 16
(a backward pass counts as two), its mean accuracy over three seeds on 500 tweets that it has not
seen is at least 15 points above that of the model before, with the weights of the last step: none
are picked by their accuracy. Learning rates are tried for 300 passes with a seed of their own (100)
and stay constant: three of them, a factor of 3 apart, and while the lowest dev loss is that of the
highest or the lowest, one more beyond it. The long runs take half of the best, falling linearly to
0: the best constant rate of three times the steps is about 1/sqrt(3) of it.

That is the second plan. By the first, the long runs had taken the best rate itself, constant;
MeZO and LOZO failed with their first seed, and it was given up ("First plan" on the page). Those
runs, and the kept ones that tried rates, had batches at random, the long runs have batches of
tweets of like length.

The runs are those of ``examples/smollm2.py``, two at a time with a thread each. What is in
``smollm2.json`` beside the page is not run again. One that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from bench import machine
from zo_fused.task.comparison import mean

ROOT = Path(__file__).resolve().parents[2]
RATES = {
    "mezo": ("1e-6", "3e-6", "1e-5"),
    "lozo": ("3e-6", "1e-5", "3e-5"),
    "adamw": ("3e-6", "1e-5", "3e-5"),
}
GRID = [f"{digit}e-{power}" for power in range(12, 0, -1) for digit in (1, 3)]
SEEDS, TUNING_SEED = (0, 1, 2), 100
FORWARDS, TUNING_FORWARDS = 1000, 300
GOAL = 0.15


class Run(NamedTuple):
    """One run of the example."""

    method: str
    lr: str
    seed: int
    forwards: int
    schedule: str

    @property
    def name(self) -> str:
        """Of the run, among all."""
        return "-".join(map(str, self))

    def go(self, folder: Path) -> dict[str, Any]:
        """Do the run; what it came to.

        Raises:
            RuntimeError: it failed.
        """
        out = folder / "runs" / self.name
        words = [sys.executable, str(ROOT / "examples" / "smollm2.py"), str(folder)]
        for name, value in {**self._asdict(), "out": out}.items():
            words += [f"--{name}", str(value)]
        out.mkdir(parents=True, exist_ok=True)
        with (out / "log").open("a") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            code = subprocess.run(words, stdout=log, stderr=log, env=environment).returncode
        if code:
            raise RuntimeError(f"a run failed: see {out / 'log'}")
        found: dict[str, Any] = json.loads((out / "result.json").read_text())
        for checkpoint in out.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        return found


class Results:
    """What runs came to, in a file."""

    def __init__(self, path: Path, folder: Path) -> None:
        self._path = path
        self._folder = folder
        self._kept = json.loads(path.read_text()) if path.exists() else {}
        self._lock = threading.Lock()

    def of(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        """The results of the runs, in order, once all of them are done."""
        missing = [run for run in runs if run.name not in self._kept]
        with ThreadPoolExecutor(2) as pool:
            for _ in pool.map(self._add, missing):
                pass
        return [self._kept[run.name] for run in runs]

    def all(self) -> list[dict[str, Any]]:
        """Those of every run that was done."""
        return list(self._kept.values())

    def _add(self, run: Run) -> None:
        found = run.go(self._folder)
        print(f"{run.name}: {found['zero_shot']:.3f} -> {found['accuracy']:.3f}", flush=True)
        with self._lock:
            self._kept[run.name] = found
            lines = (f"{json.dumps(name)}: {json.dumps(r)}" for name, r in self._kept.items())
            self._path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def best(losses: dict[str, float]) -> str:
    """The rate with the lowest loss."""
    return min(losses, key=losses.__getitem__)


def tuned(results: Results) -> dict[str, dict[str, float]]:
    """The dev loss after each learning rate, by method; the rates in their order."""
    rates = {method: list(tried) for method, tried in RATES.items()}
    while True:
        runs = [
            Run(method, lr, TUNING_SEED, TUNING_FORWARDS, "constant")
            for method in RATES
            for lr in rates[method]
        ]
        losses: dict[str, dict[str, float]] = {method: {} for method in RATES}
        for run, result in zip(runs, results.of(runs), strict=True):
            losses[run.method][run.lr] = result["curve"][-1][1]
        wider = {method: wide(losses[method]) for method in RATES}
        if wider == rates:
            return losses
        rates = wider


def wide(losses: dict[str, float]) -> list[str]:
    """The rates, and one more if the best of them is the first or the last."""
    rates = list(losses)
    if best(losses) == rates[0]:
        return [GRID[GRID.index(rates[0]) - 1], *rates]
    if best(losses) == rates[-1]:
        return [*rates, GRID[GRID.index(rates[-1]) + 1]]
    return rates


def row(method: str, results: Sequence[dict[str, Any]]) -> str:
    """A line of the table."""
    ends = [result["accuracy"] for result in results]
    before = mean([result["zero_shot"] for result in results])
    gain = mean(ends) - before
    cells = [
        method,
        f"{results[0]['lr']:g}",
        str(results[0]["forwards"]),
        f"{before:.3f}",
        f"{mean(ends):.3f} ({min(ends):.3f} to {max(ends):.3f})",
        f"{100 * gain:+.1f}",
        "yes" if gain >= GOAL else "no",
        f"{mean([result['curve'][-1][1] for result in results]):.3f}",
        f"{mean([result['seconds_a_forward'] for result in results]):.2f}",
        f"{mean([result['peak_memory_bytes'] for result in results]) / 2**20:.0f} MiB",
    ]
    return f"| {' | '.join(cells)} |"


def page(
    losses: dict[str, dict[str, float]],
    results: dict[str, list[dict[str, Any]]],
    given_up: Sequence[dict[str, Any]],
) -> str:
    """The page of results."""
    rules = [text.replace("\n", " ") for text in (__doc__ or "").split("\n\n")[1:3]]
    head = (
        "method",
        "lr",
        "passes",
        "accuracy before",
        "after, mean and range of the seeds",
        "points",
        "succeeds",
        "dev loss",
        "seconds a pass",
        "peak memory",
    )
    rates = [
        f"| {method} | {', '.join(f'{lr}: {loss:.3f}' for lr, loss in tried.items())} |"
        for method, tried in losses.items()
    ]
    header = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines = [
        "# SmolLM2-135M on tweets",
        "`python -m bench.training.smollm2 DIR` (`python -m bench.training.tweets DIR` before it)",
        "  \n".join(machine.of_cpu()),
        *rules,
        "A thread a run, two runs at a time, some beside other work: seconds are not to be "
        "compared closely. Seconds hold the evaluations. Peak memory is that of the process, "
        "torch included.",
        "\n".join([*header, *map(row, results, results.values())]),
        "![dev loss and accuracy over forward passes](smollm2.png)",
        "Learning rates tried (dev loss after 300 passes):",
        "\n".join(["| method | rate: loss |", "|---|---|", *rates]),
    ]
    if given_up:
        lines += [
            "## First plan",
            "\n".join([*header, *(row(result["method"], [result]) for result in given_up)]),
        ]
    return "\n\n".join(lines) + "\n"


def draw(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Writes the picture: mean over seeds, and a band from the lowest to the highest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, column, name in zip(panels, (1, 2), ("dev loss", "dev accuracy"), strict=True):
        for number, (method, runs) in enumerate(results.items()):
            at = [point[0] for point in runs[0]["curve"]]
            points = list(zip(*([p[column] for p in run["curve"]] for run in runs), strict=True))
            color = f"C{number}"
            axes.plot(at, list(map(mean, points)), color=color, label=method)
            axes.fill_between(
                at, list(map(min, points)), list(map(max, points)), color=color, alpha=0.15, lw=0
            )
        axes.set_xlabel("forward passes (a backward pass is two)")
        axes.set_ylabel(name)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    figure.savefig(path)


def main() -> int:
    """Does the runs and writes the page; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="what bench.training.tweets has written")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    options = parser.parse_args()
    try:
        kept = Results(options.out / "smollm2.json", options.folder)
        losses = tuned(kept)
        rates = {method: f"{float(best(tried)) / 2:g}" for method, tried in losses.items()}
        runs = [Run(m, rates[m], seed, FORWARDS, "linear") for m in RATES for seed in SEEDS]
        found = kept.of(runs)
    except RuntimeError as error:
        print(f"smollm2: {error}", file=sys.stderr)
        return 1
    results = {
        method: [result for run, result in zip(runs, found, strict=True) if run.method == method]
        for method in RATES
    }
    given_up = [
        result
        for result in kept.all()
        if (result["schedule"], result["forwards"]) == ("constant", FORWARDS)
    ]
    draw(results, options.out / "smollm2.png")
    (options.out / "smollm2.md").write_text(page(losses, results, given_up))
    print((options.out / "smollm2.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
