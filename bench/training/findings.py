"""The qualitative findings of the ZO benchmark (arXiv 2402.11592), on the embedded task:
``python -m bench.training.findings --out bench/results/findings.md``.

Task alignment, queries, blocks. Every run is of the embedded model on the embedded data, one
thread, two runs at a time; of each learning rate of a grid the mean over the seeds counts, chosen
by the accuracy on dev, shown on test. Memory is `bench/training/hybrid_memory.py`.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import zo_fused
from bench import machine
from zo_fused.cli.defaults import EMBEDDED_DATA, EMBEDDED_MODEL
from zo_fused.task.data import read_examples
from zo_fused.task.encoding import Encoded, Encoder, maximum_length
from zo_fused.task.models import load_model, load_tokenizer
from zo_fused.task.order import batch_indices
from zo_fused.task.prompt import Task
from zo_fused.task.scoring import Scorer

BATCH, SEEDS = 16, (0, 1)
FACTORS = (0.3, 1.0, 3.0)  # of a learning rate
ZEROTH: dict[str, tuple[Callable[..., Any], float, dict[str, Any]]] = {
    "MeZO": (zo_fused.MeZO, 3e-5, {"deferred": True}),
    "LOZO": (zo_fused.LOZO, 3e-5, {"deferred": True}),
    "ForwardGrad": (zo_fused.ForwardGrad, 3e-5, {}),
}
FIRST: dict[str, tuple[Callable[..., Any], float]] = {
    "SGD": (torch.optim.SGD, 3e-2),
    "AdamW": (torch.optim.AdamW, 1e-4),
}


class Run(NamedTuple):
    """One training run; `cell` is the place of the table that it belongs to."""

    cell: tuple[str, str]
    method: str
    factor: float
    seed: int
    steps: int
    template: bool = True
    queries: int = 1


class Accuracies(NamedTuple):
    """Before and after."""

    before: float
    dev: float
    test: float


def setting(template: bool) -> tuple[nn.Module, Scorer, dict[str, list[Encoded]]]:
    """The embedded model, and what to train and test it with."""
    model = load_model(str(EMBEDDED_MODEL), "float32", torch.device("cpu"))
    tokenizer = load_tokenizer(str(EMBEDDED_MODEL))
    task = Task.from_file(EMBEDDED_DATA / "task.json")
    task = task if template else task.without_words()
    encoder = Encoder(task, tokenizer, maximum_length(model, tokenizer))
    data = {
        split: encoder.encode(read_examples(str(EMBEDDED_DATA), task, split))
        for split in ("train", "dev", "test")
    }
    return model, Scorer(model, encoder.answers, tokenizer.pad_token_id or 0), data


def train(run: Run) -> Accuracies:
    """The run."""
    torch.set_num_threads(1)
    model, scorer, data = setting(run.template)
    before = scorer.evaluate(data["test"], 64).accuracy
    step = first_order(run, model) if run.method in FIRST else zeroth_order(run, model)
    for number in range(run.steps):
        rows = batch_indices(len(data["train"]), BATCH, run.seed, number)
        batch = scorer.batch([data["train"][i] for i in rows])
        step(lambda batch=batch: scorer.loss(batch))
    accuracy = {split: scorer.evaluate(data[split], 64).accuracy for split in ("dev", "test")}
    return Accuracies(before, **accuracy)


def zeroth_order(run: Run, model: nn.Module) -> Callable[[Callable[[], Tensor]], Any]:
    """A step of an optimizer of zo_fused."""
    cls, lr, options = ZEROTH[run.method]
    options = {**options, "queries": run.queries, "lr": lr * run.factor, "seed": run.seed}
    opt = cls(model, **options)

    def step(closure: Callable[[], Tensor]) -> None:
        opt.step(closure)
        if opt.step_count == run.steps:
            opt.flush()

    return step


def first_order(run: Run, model: nn.Module) -> Callable[[Callable[[], Tensor]], Any]:
    """A step with a gradient."""
    cls, lr = FIRST[run.method]
    opt = cls(model.parameters(), lr=lr * run.factor)

    def step(closure: Callable[[], Tensor]) -> None:
        opt.zero_grad()
        closure().backward()
        opt.step()

    return step


# ---- what is run ---------------------------------------------------------------------------------


def alignment(steps: int) -> list[Run]:
    """With and without the words of the template. A first-order step sees a fourth as many batches:
    it needs fewer."""
    return [
        Run((name, "template" if template else "none"), name, factor, seed, count, template)
        for name, count in (
            *((name, steps) for name in ("MeZO", "LOZO")),
            *((name, steps // 4) for name in FIRST),
        )
        for template in (True, False)
        for factor in FACTORS
        for seed in SEEDS
    ]


def queries(steps: int, counts: Sequence[int]) -> list[Run]:
    """More queries a step, the same number of steps; the rate grows with the root of them."""
    return [
        Run((name, f"q = {q}"), name, factor * q**0.5, seed, steps, queries=q)
        for name in ("MeZO", "ForwardGrad")
        for q in counts
        for factor in FACTORS
        for seed in SEEDS
    ]


def execute(runs: list[Run]) -> dict[tuple[str, str], tuple[float, list[Accuracies]]]:
    """The best factor of every cell by the mean on dev, and its runs."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        results = list(tqdm(pool.map(train, runs), total=len(runs), unit="run", disable=None))
    cells: dict[tuple[str, str], dict[float, list[Accuracies]]] = {}
    for run, result in zip(runs, results, strict=True):
        cells.setdefault(run.cell, {}).setdefault(run.factor, []).append(result)
    best = {}
    for cell, by_factor in cells.items():
        factor = max(by_factor, key=lambda f: statistics.mean(a.dev for a in by_factor[f]))
        best[cell] = (factor, by_factor[factor])
    return best


# ---- the variance of estimates -------------------------------------------------------------------


def squared_errors(draws: int) -> list[tuple[str, int, float]]:
    """Name, forward passes and mean of |estimate - gradient|^2 / |gradient|^2, on one batch.

    An estimate is what a step of ``lr = 1`` takes off the weights.
    """
    torch.set_num_threads(2)
    model, scorer, data = setting(template=True)
    batch = scorer.batch(data["train"][:BATCH])
    params = list(model.parameters())
    scorer.loss(batch).backward()
    exact = [p.grad.clone() for p in params if p.grad is not None]
    start = [p.detach().clone() for p in params]
    size = sum(float(g.double().square().sum()) for g in exact)
    blocks = zo_fused.layer_blocks(model)
    count = len(blocks)
    variants: dict[str, Callable[[], Any]] = {
        "MeZO": lambda: zo_fused.MeZO(model, lr=1.0),
        f"MeZO, {count} queries": lambda: zo_fused.MeZO(model, lr=1.0, queries=count),
        f"MeZO, {count} blocks at once": lambda: zo_fused.MeZO(
            blocks, lr=1.0, block_order="simultaneous"
        ),
        "MeZO, Rademacher": lambda: zo_fused.MeZO(model, lr=1.0, distribution="rademacher"),
        "LOZO, rank 2": lambda: zo_fused.LOZO(model, lr=0.5),  # E[(U V^T) g] has rank in it
        "ForwardGrad": lambda: zo_fused.ForwardGrad(model, lr=1.0),
    }
    rows = []
    for name, make in variants.items():
        opt, total = make(), 0.0
        for _ in tqdm(range(draws), desc=name, disable=None):
            opt.step(lambda: scorer.loss(batch))
            with torch.no_grad():
                for p, q, g in zip(params, start, exact, strict=True):
                    total += float((q - p - g).double().square().sum())
                    p.copy_(q)
        rows.append((name, opt.forwards, total / draws / size))
    return rows


# ---- the page ------------------------------------------------------------------------------------


def accuracy_table(best: dict[tuple[str, str], tuple[float, list[Accuracies]]]) -> list[str]:
    """A row a method, a column a condition: test accuracy, its range, and the factor."""
    methods, columns = ([*dict.fromkeys(cell[i] for cell in best)] for i in (0, 1))
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for method in methods:
        texts = []
        for column in columns:
            factor, runs = best[method, column]
            tests = [100 * a.test for a in runs]
            spread = f"{min(tests):.1f} to {max(tests):.1f}"
            texts.append(f"{statistics.mean(tests):.1f} ({spread}; lr x {factor:.2g})")
        lines.append(f"| {method} | {' | '.join(texts)} |")
    return lines


def variance_part(options: argparse.Namespace) -> tuple[str, list[str]]:
    """Title and lines."""
    errors = squared_errors(options.draws)
    lines = ["| estimate | forward passes | squared error over squared gradient |", "|---|---|---|"]
    lines += [f"| {name} | {forwards} | {error:.3g} |" for name, forwards, error in errors]
    return "Variance of an estimate", lines


def alignment_part(options: argparse.Namespace) -> tuple[str, list[str]]:
    """Title and lines."""
    best = execute(alignment(options.steps))
    before = {cell[1]: runs[0].before for cell, (_, runs) in best.items()}
    starts = ", ".join(f"{name}: {100 * value:.1f} %" for name, value in before.items())
    text = (
        f"Test accuracy in percent after {options.steps} steps (first-order: {options.steps // 4}),"
        f" mean and range over seeds {SEEDS}. Before: {starts}."
    )
    return "Task alignment", [text, "", *accuracy_table(best)]


def queries_part(options: argparse.Namespace) -> tuple[str, list[str]]:
    """Title and lines."""
    best = execute(queries(options.query_steps, options.counts))
    text = (
        f"Test accuracy in percent after {options.query_steps} steps of q queries; learning rates "
        "are the grid times the root of q."
    )
    return "Queries", [text, "", *accuracy_table(best)]


def page(command: str, parts: list[tuple[str, list[str]]]) -> str:
    """The Markdown text."""
    where = "  \n".join(machine.of_cpu())
    body = [f"# Findings on the embedded task\n\n`{command}`\n\n{where}"]
    body += [f"## {title}\n\n" + "\n".join(lines) for title, lines in parts]
    return "\n\n".join(body) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600, help="of a zeroth-order run")
    parser.add_argument("--query-steps", type=int, default=200, help="of a run of several queries")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 8], help="of queries")
    parser.add_argument("--draws", type=int, default=200, help="of every estimate")
    parser.add_argument("--parts", nargs="+", default=["variance", "alignment", "queries"])
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write")
    options = parser.parse_args()
    made = {"variance": variance_part, "alignment": alignment_part, "queries": queries_part}
    parts = [made[name](options) for name in options.parts]
    command = shlex.join(["python", "-m", "bench.training.findings", *sys.argv[1:]])
    options.out.write_text(page(command, parts))


if __name__ == "__main__":
    main()
