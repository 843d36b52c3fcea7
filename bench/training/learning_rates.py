"""Learning rates for the embedded model:
``python -m bench.training.learning_rates --out FILE.md``; with ``--vary eps``, perturbation radii.

Every method with rates a factor sqrt(10) apart around its default (radii: 10), all with the same
budget of forward passes and the machinery of ``zo-fused compare``: two runs at a time with a thread
each, and what is finished in ``--runs`` is not done again. The accuracy is that on dev after the
last step, so that the choice of a rate has not seen the test data.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from zo_fused.cli import defaults
from zo_fused.cli.compare import make_runs
from zo_fused.cli.method_options import by_method
from zo_fused.cli.parser import whole
from zo_fused.cli.runs import Run, run_all
from zo_fused.task.comparison import mean, read_outcome
from zo_fused.task.errors import Interrupted, UserError

FACTORS = {"lr": 10**0.5, "eps": 10.0}


class Rate(NamedTuple):
    """A learning rate (or radius) of a method, and the dev accuracies that it led to."""

    method: str
    value: str
    accuracies: list[float]


def grid(method: str, span: int, vary: str = "lr") -> list[str]:
    """Rates around a method's default, lowest first, as they are written in options."""
    value = defaults.defaults(method.partition(":")[0], embedded=True)[vary]
    return [f"{value * FACTORS[vary] ** power:.2g}" for power in range(-span, span + 1)]


def read_rates(
    methods: Sequence[str], span: int, runs: Sequence[Run], vary: str = "lr"
) -> list[Rate]:
    """The rates of every method, with the accuracies of the runs that are finished."""
    done = {(run.method, run.seed): run for run in runs if run.finished}
    rates = []
    for method in methods:
        for value in grid(method, span, vary):
            name = f"{method}:{vary}={value}"
            own = [run for (made, _), run in done.items() if made == name]
            outcomes = [read_outcome(name, run.seed, run.output) for run in own]
            after = [outcome.summary["accuracy"]["dev"]["after"] for outcome in outcomes]
            rates.append(Rate(method, value, after))
    return rates


def markdown(rates: Sequence[Rate], note: str, vary: str = "lr") -> str:
    """A table with a row for each method; the best rate is bold, and marked at the grid's edge."""
    methods = list(dict.fromkeys(rate.method for rate in rates))
    own = {method: [rate for rate in rates if rate.method == method] for method in methods}
    width = max(map(len, own.values()))
    lines = [
        f"| method | {vary}: accuracy on dev after the run |" + " |" * (width - 1),
        "|---|" + "---|" * width,
    ]
    for method, row in own.items():
        best = max(row, key=lambda rate: mean(rate.accuracies) if rate.accuracies else -1.0)
        cells = []
        for rate in row:
            text = f"{mean(rate.accuracies):.3f}" if rate.accuracies else "failed"
            text = f"{rate.value}: {text}"
            if rate is best and rate.accuracies:
                text = f"**{text}**" + (" (edge)" if rate in (row[0], row[-1]) else "")
            cells.append(text)
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", note, ""])


def main() -> int:
    """Does the runs and writes the table; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", default=",".join(by_method()), help="as of compare")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--forwards", type=whole, default=2 * defaults.EMBEDDED_COMMON["steps"])
    parser.add_argument("--vary", choices=FACTORS, default="lr")
    parser.add_argument("--span", type=whole, default=2, help="rates on each side of the default")
    parser.add_argument("--runs", type=Path, default=Path("zo-fused-runs") / "learning-rates")
    parser.add_argument("--out", type=Path, default=Path("bench/results/learning-rates.md"))
    args = parser.parse_args()
    methods = args.methods.split(",")
    if args.vary == "eps":  # forward-grad has none
        methods = [name for name in methods if "eps" in by_method()[name.partition(":")[0]]]
    seeds = [int(seed) for seed in args.seeds.split(",")]
    # dev is evaluated before and after alone; test is not looked at
    data = defaults.EMBEDDED_DATA
    shared = [f"--{split}={data / split}.jsonl" for split in ("train", "dev")]
    shared += [f"--task={data / 'task.json'}", f"--forwards={args.forwards}"]
    shared.append(f"--eval-steps={args.forwards}")
    try:
        names = [
            f"{method}:{args.vary}={value}"
            for method in methods
            for value in grid(method, args.span, args.vary)
        ]
        runs = make_runs(names, seeds, shared, args.runs)
        failures = run_all(runs, parallel=2, threads=1)
    except (UserError, Interrupted) as error:
        print(f"learning_rates: {error}", file=sys.stderr)
        return 2
    note = f"Embedded model, {args.forwards} training forward passes, mean over seeds {args.seeds}."
    table = markdown(read_rates(methods, args.span, runs, args.vary), note, args.vary)
    args.out.write_text(table)
    print(table)
    for failure in failures:
        print(f"learning_rates: {failure}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
