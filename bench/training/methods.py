"""Which method is worth its forward passes: ``python -m bench.training.methods TASK``.

The rules are in `protocol.json`, fixed before the runs. Every method gets the same forward passes
and as many learning rates around a rate of its own; the rate with the lowest dev loss (one seed)
goes on to three other seeds. Runs are those of ``zo-fused compare``, two at a time with a thread
each; what is finished in ``--runs`` is not done again. After every method ``methods-TASK.json``,
``.md`` and ``.png`` are written; methods that are in the first already stay there until they are
named again, so a page can be made in several sittings.

The tasks "sentiment" (the embedded one) and "opinions" (`examples/embedded/make_data.py`) take the
embedded model, "tweets", "tweets-wide" and "tweets-lora" a real one (`bench.training.tweets`, whose
packages must be installed).
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
from bench.training.outcomes import Result, of_all, read, write
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


def measure(task: str, method: str, shared: Sequence[str], folder: Path) -> tuple[Result, Failures]:
    """The rates of a method, and its seeds with the best of them; a sentence for every seed that
    failed."""
    rates = grid(task, method)
    tried = make_runs(
        [f"{method}:lr={rate}" for rate in rates],
        [PROTOCOL["tuning_seed"]],
        shared,
        folder / "rates",
    )
    do(tried)
    ends = dict(zip(rates, map(last_loss, tried), strict=True))
    runs = make_runs(
        [f"{method}:lr={best(ends)}"],
        rule(task, "seeds"),
        shared,
        folder / "seeds",
    )
    failures = do(runs)
    outcomes = [
        replace(read_outcome(run.method, run.seed, run.output), method=method)
        for run in runs
        if run.finished
    ]
    return Result(machine.commit(), ends, outcomes), failures


Failures = list[str]


def best(rates: dict[str, float]) -> str:
    return min(rates, key=lambda rate: rates[rate])


def beats(runs: Sequence[Outcome], base: Sequence[Outcome], speed: float | None) -> bool:
    """The protocol's criterion."""
    ends, others = ([losses(run.history, "dev")[-1][1] for run in group] for group in (runs, base))
    return speed is not None and speed > 1 and max(ends) < min(others)


def rates_table(chosen: dict[str, dict[str, float]]) -> str:
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


def report(task: str, results: dict[str, Result], out: Path) -> None:
    """Writes the page and the picture."""
    forwards = PROTOCOL["tasks"][task]["forwards"]
    outcomes = of_all(list(results.values()))
    draw(outcomes, f"{task}: {forwards} training forward passes", out / f"methods-{task}.png")
    commits = dict.fromkeys(result.commit for result in results.values())
    page = [
        f"# Methods on the task {task}",
        f"`{shlex.join(['python', '-m', 'bench.training.methods', *sys.argv[1:]])}`",
        "  \n".join(machine.of_cpu()),
        f"{forwards} training forward passes; rules: [protocol.json](../training/protocol.json). "
        + PROTOCOL["criterion"],
        f"Runs of the commits {', '.join(commits)}; not all on one machine, and some beside other "
        "work, so times are not to be compared.",
        verdicts(outcomes),
        comparison.markdown(summarize(outcomes)),
        f"![dev loss over forward passes](methods-{task}.png)",
        "Learning rates tried:",
        rates_table({method: result.rates for method, result in results.items()}),
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
    task, order = args.task, list(PROTOCOL["methods"])
    methods = args.methods.split(",") if args.methods else list(order)
    for method in methods:
        if method not in order:
            parser.error(f"protocol.json has no method {method!r}")
    args.out.mkdir(parents=True, exist_ok=True)
    kept = args.out / f"methods-{task}.json"
    results, failures = read(kept), []
    # what the others are compared with comes first
    if "mezo" not in results and "mezo" not in methods:
        methods.append("mezo")
    try:
        shared = [
            *data(task, args.runs),
            *rule(task, "options"),
            f"--forwards={rule(task, 'forwards')}",
        ]
        for method in sorted(methods, key=order.index):
            results[method], failed = measure(task, method, shared, args.runs / task)
            failures += failed
            results = {name: results[name] for name in order if name in results}
            write(kept, results)
            report(task, {name: r for name, r in results.items() if r.runs}, args.out)
    except (UserError, Interrupted) as error:
        print(f"methods: {error}", file=sys.stderr)
        return 2
    for failure in failures:
        print(f"methods: {failure}", file=sys.stderr)
    print((args.out / f"methods-{task}.md").read_text())
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
