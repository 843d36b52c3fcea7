"""Which method is worth its forward passes: ``python -m bench.training.methods TASK``.

The rules are in `protocol.json`, fixed before the runs. Every method gets the same forward passes
and as many learning rates around a rate of its own; the rate with the lowest dev loss (one seed)
goes on to three other seeds. Runs are those of ``zo-fused compare``, two at a time with a thread
each; what is finished in ``--runs`` is not done again. Writes ``methods-TASK.md`` and ``.png``.

The tasks "sentiment" (the embedded one) and "opinions" (`examples/embedded/make_data.py`) take the
embedded model, "tweets" and "tweets-lora" a real one (`bench.training.tweets`, whose packages must
be installed).
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import machine
from bench.training import tweets
from zo_fused.cli.compare import make_runs
from zo_fused.cli.defaults import EMBEDDED_DATA
from zo_fused.cli.runs import Run, run_all
from zo_fused.task import comparison
from zo_fused.task.comparison import Outcome, read_outcome, summarize
from zo_fused.task.comparison_picture import draw
from zo_fused.task.errors import Interrupted, UserError
from zo_fused.task.history import losses

HERE = Path(__file__).parent
MAKE_DATA = HERE.parents[1] / "examples" / "embedded" / "make_data.py"
PROTOCOL: dict[str, Any] = json.loads((HERE / "protocol.json").read_text())


def rule(task: str, name: str) -> Any:
    """What the protocol says of a task, or else of all."""
    of_task = PROTOCOL["tasks"][task]
    return of_task[name] if name in of_task else PROTOCOL[name]


def grid(task: str, method: str) -> list[str]:
    """Learning rates around the method's own, lowest first, as they are written in options."""
    centres = PROTOCOL["methods"][method]
    centre = centres.get(task, centres["embedded"])
    count = rule(task, "rates")
    powers = [power - (count - 1) / 2 for power in range(count)]
    return [f"{centre * PROTOCOL['factor'] ** power:.2g}" for power in powers]


def data(task: str, folder: Path) -> list[str]:
    """The options that say what is tuned on what; makes what is not there."""
    model = []
    if task == "sentiment":
        place = EMBEDDED_DATA
    elif task == "opinions":
        place = folder / "opinions"
        command = [sys.executable, MAKE_DATA, "--task", "opinions", "--dev", "400", "--out", place]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    else:
        tweets.write(folder / "tweets")
        place = folder / "tweets" / "data"
        model = [f"--model={folder / 'tweets' / 'model'}"]
    files = [f"--{split}={place / split}.jsonl" for split in ("train", "dev", "test")]
    return [*model, *files, f"--task={place / 'task.json'}"]


def of_method(run: Run) -> str:
    """Its method without the rate."""
    return run.method.partition(":lr=")[0]


def do(runs: Sequence[Run]) -> list[str]:
    """Does the runs that are not finished; a sentence for every one that failed. Models, which no
    one will look at, are not kept."""
    failures = []
    for method in dict.fromkeys(of_method(run) for run in runs):
        own = [run for run in runs if of_method(run) == method]
        failures += run_all(own, parallel=2, threads=1)
        for run in own:
            for weights in run.output.glob("*.safetensors"):
                weights.unlink()
    return failures


def last_loss(run: Run) -> float:
    """The dev loss at the end; infinity if there is none."""
    if not run.finished:
        return math.inf
    found = losses(read_outcome(run.method, run.seed, run.output).history, "dev")
    return found[-1][1] if found and math.isfinite(found[-1][1]) else math.inf


def choose(task: str, methods: Sequence[str], shared: Sequence[str], folder: Path) -> Chosen:
    """The best rate of every method, and what all of them came to."""
    names = [f"{method}:lr={rate}" for method in methods for rate in grid(task, method)]
    runs = make_runs(names, [PROTOCOL["tuning_seed"]], shared, folder)
    do(runs)
    ends = {run.method: last_loss(run) for run in runs}
    return {
        method: {rate: ends[f"{method}:lr={rate}"] for rate in grid(task, method)}
        for method in methods
    }


Chosen = dict[str, dict[str, float]]  # method -> rate -> dev loss at the end


def best(rates: dict[str, float]) -> str:
    return min(rates, key=lambda rate: rates[rate])


def beats(runs: Sequence[Outcome], base: Sequence[Outcome], speed: float | None) -> bool:
    """The protocol's criterion."""
    ends, others = ([losses(run.history, "dev")[-1][1] for run in group] for group in (runs, base))
    return speed is not None and speed > 1 and max(ends) < min(others)


def rates_table(chosen: Chosen) -> str:
    """Every rate tried, and the dev loss that it led to; the best is bold, an edge is named."""
    lines = ["| method | learning rate: dev loss at the end, one seed |", "|---|---|"]
    for method, rates in chosen.items():
        cells = []
        for rate, loss in rates.items():
            text = f"{rate}: {loss:.3f}" if math.isfinite(loss) else f"{rate}: diverged"
            if rate == best(rates):
                edge = rate in (next(iter(rates)), next(reversed(rates)))
                text = f"**{text}**" + (" (edge)" if edge else "")
            cells.append(text)
        lines.append(f"| {method} | {', '.join(cells)} |")
    return "\n".join(lines)


def verdicts(outcomes: Sequence[Outcome]) -> str:
    """Who beats MeZO, which is the first method, by the criterion."""
    groups = comparison.by_method(outcomes)
    (first, base), *others = groups.items()
    speeds = {row["method"]: row["speed"] for row in summarize(outcomes)}
    won = [name for name, runs in others if beats(runs, base, speeds[name])]
    return f"By the criterion, {first} is beaten by: {', '.join(won) or 'none'}."


def report(task: str, chosen: Chosen, outcomes: Sequence[Outcome], out: Path) -> None:
    """Writes the page and the picture."""
    forwards = PROTOCOL["tasks"][task]["forwards"]
    draw(outcomes, f"{task}: {forwards} training forward passes", out / f"methods-{task}.png")
    page = [
        f"# Methods on the task {task}",
        f"`{shlex.join(['python', '-m', 'bench.training.methods', *sys.argv[1:]])}`",
        "  \n".join(machine.of_cpu()),
        f"{forwards} training forward passes; rules: [protocol.json](../training/protocol.json). "
        + PROTOCOL["criterion"],
        verdicts(outcomes),
        comparison.markdown(summarize(outcomes)),
        f"![dev loss over forward passes](methods-{task}.png)",
        "Learning rates tried:",
        rates_table(chosen),
    ]
    (out / f"methods-{task}.md").write_text("\n\n".join(page) + "\n", encoding="utf-8")


def main() -> int:
    """Does the runs and writes the page; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("task", choices=PROTOCOL["tasks"])
    parser.add_argument("--methods", help="names of protocol.json, with commas (default: all)")
    parser.add_argument("--runs", type=Path, default=Path("zo-fused-runs") / "methods")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results")
    args = parser.parse_args()
    methods = args.methods.split(",") if args.methods else list(PROTOCOL["methods"])
    methods.sort(key=lambda method: method != "mezo")  # what the others are compared with
    args.out.mkdir(parents=True, exist_ok=True)
    folder = args.runs / args.task
    try:
        options = rule(args.task, "options")
        shared = [
            *data(args.task, args.runs),
            *options,
            f"--forwards={rule(args.task, 'forwards')}",
        ]
        chosen = choose(args.task, methods, shared, folder / "rates")
        names = {f"{method}:lr={best(chosen[method])}": method for method in methods}
        runs = make_runs(list(names), rule(args.task, "seeds"), shared, folder / "seeds")
        failures = do(runs)
    except (UserError, Interrupted) as error:
        print(f"methods: {error}", file=sys.stderr)
        return 2
    done = [run for run in runs if run.finished]
    outcomes = [
        replace(read_outcome(run.method, run.seed, run.output), method=names[run.method])
        for run in done
    ]
    report(args.task, chosen, outcomes, args.out)
    for failure in failures:
        print(f"methods: {failure}", file=sys.stderr)
    print((args.out / f"methods-{args.task}.md").read_text())
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
