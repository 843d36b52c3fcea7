"""Methods on two toy problems: ``python -m bench.training.toys``.

Two problems whose gradient, noise and dimension are known, so that the result of a method can be
held against theory. "quadratic": three linear regressions of 16 x 16 weights (768), whose inputs
and errors have spectra i^-1.5 and i^-1. "network": a tanh network 16-24-24-4 (1108 weights),
trained on one teacher and tuned to another one near it. Batches of 16 from 512 examples.

Written down before the runs. Every method has 3,000 forward passes and eps 1e-3. Learning rates are
a factor of sqrt(10) apart: with one seed, from 0.01 up and down until the loss gets worse on both
sides; then three other seeds with the best one. The loss is that of all examples, over its start's
and less the lowest possible; what counts is the mean of the last tenth. Speed is how many times
fewer passes than MeZO a method takes to the lowest loss that both reach. Small problems flatter
probes and momentum, and short runs hurt windows: differences below 15 % are noise.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import machine
from zo_fused.methods.table import recipes
from zo_fused.task.comparison import Curve, mean, speed, spread
from zo_fused.task.optimizers import make_optimizer, steps_within

ROOT = Path(__file__).resolve().parents[2]
FORWARDS, POINTS, BATCH, EXAMPLES = 3000, 30, 16, 512
TUNING_SEED, SEEDS = 100, (0, 1, 2)
LAST = 12  # power of sqrt(10) from 0.01, up and down, that is tried
SIZE = 16
QUERIES = {"queries": 8, "one_sided": True}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "MeZO": ("mezo", {}),
    "MeZO, 8 one-sided queries": ("mezo", QUERIES),
    "MeZO-M": ("mezo-m", {}),
    "MeZO-GV": ("mezo-gv", {}),
    "MeZO-Greedy": ("mezo-greedy", {}),
    "ZO-Adam": ("zo-adam", {}),
    "ZO-signSGD": ("zo-sign", {}),
    "MEAZO": ("meazo", {}),
    "FZOO": ("fzoo", {}),
    "KerZOO": ("kerzoo", {}),
    "ConMeZO": ("conmezo", {}),
    "LOREN": ("loren", {}),
    "HiZOO": ("hizoo", {"hessian_smooth": 1e-2}),
    "Sparse MeZO, a quarter": ("sparse-mezo", {"share": 0.25}),
    "LOZO": ("lozo", {"interval": 50}),
    "LOZO-M": ("lozo-m", {"interval": 50}),
    "SubZero, windows of 5": ("subzero", {"rank": 4, "interval": 5}),
    "SubZero, windows of 25": ("subzero", {"rank": 4, "interval": 25}),
    "SubZero, windows of 100": ("subzero", {"rank": 4, "interval": 100}),
    "SubZero+": ("subzero-adam", {"rank": 4, "interval": 5, **QUERIES}),
    "TeZO": ("tezo", {}),
    "TeZO-Adam": ("tezo-adam", {}),
    "P-GAP": ("p-gap", {"rank": 4, "interval": 25}),
    "SVD-0": ("svd-0", {"rank": 4, "interval": 25}),
    "ZO-Muon": ("zo-muon", {"rank": 4, "interval": 20}),
    "ZO-MOPI": ("zo-mopi", {"rank": 4, "interval": 20}),
    "AGZO": ("agzo", {"rank": 4}),
    "ZO-Act": ("zo-act", {"rank": 4}),
    "SeeZO": ("seezo", {"rank": 4}),
    "ES": ("es", {"population": 8}),
}


@dataclass(frozen=True)
class Problem:
    """Data and a loss, and a model to begin with."""

    x: Tensor
    y: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    lowest: float  # loss of all examples
    start: Callable[[int], nn.Module]  # by the seed


class Regressions(nn.Module):
    """Linear layers side by side, with their outputs times a matrix each: [n, layers, SIZE]."""

    def __init__(self, roots: Sequence[Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(SIZE, SIZE, bias=False) for _ in roots)
        self.roots = list(roots)

    def forward(self, x: Tensor) -> Tensor:
        parts = zip(self.layers, x.unbind(1), self.roots, strict=True)
        outputs = [layer(part) @ root for layer, part, root in parts]
        return torch.stack(outputs, 1)


def _orthogonal(generator: torch.Generator) -> Tensor:
    normal = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(normal).Q


def _spectrum(power: float) -> Tensor:
    return torch.arange(1, SIZE + 1, dtype=torch.float64) ** -power


def quadratic() -> Problem:
    """Three regressions with noise in y; the second and third count a half and a quarter."""
    generator = torch.Generator().manual_seed(7)
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    lowest = 0.0
    for layer in range(3):
        axes = _orthogonal(generator)
        root = (axes * (0.5**layer * _spectrum(1.0)).sqrt()) @ axes.T
        x = (normal(EXAMPLES, SIZE) * _spectrum(1.5).sqrt()) @ _orthogonal(generator)
        target = 0.2 * normal(SIZE, SIZE)
        y = (x @ target.T + 0.02 * normal(EXAMPLES, SIZE)) @ root
        best = torch.linalg.lstsq(x, y).solution
        lowest += _half_square(x @ best, y).item()
        parts.append((x, y, root.float(), target))
    xs, ys, roots, targets = zip(*parts, strict=True)

    def start(seed: int) -> nn.Module:
        model = Regressions(roots)
        drawn = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight, target in zip(model.parameters(), targets, strict=True):
                away = torch.randn(SIZE, SIZE, generator=drawn, dtype=torch.float64)
                weight.copy_(target + 0.2 * away)
        return model

    x, y = (torch.stack(tensors, 1).float() for tensors in (xs, ys))
    return Problem(x, y, _half_square, lowest, start)


def _half_square(out: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (out - y).square().sum() / len(y)


def network() -> Problem:
    """Cross entropy to a teacher's probabilities, from what was learnt of another teacher."""
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(EXAMPLES, SIZE, generator=generator) * _spectrum(0.5).float()
    first, second, student = (_tanh_network(generator, scale) for scale in (2.0, 2.0, 1.0))
    with torch.no_grad():
        for near, far in zip(second.parameters(), first.parameters(), strict=True):
            near.mul_(0.5).add_(far)
        before, after = (teacher(x).softmax(1) for teacher in (first, second))
    adam = torch.optim.Adam(student.parameters(), lr=0.01)
    for _ in range(400):
        adam.zero_grad()
        nn.functional.cross_entropy(student(x), before).backward()
        adam.step()
    learnt = {name: tensor.clone() for name, tensor in student.state_dict().items()}

    def start(seed: int) -> nn.Module:
        model = _tanh_network(torch.Generator(), 1.0)
        model.load_state_dict(learnt)
        return model

    entropy = -(after * after.log()).sum(1).mean().item()
    return Problem(x, after, nn.functional.cross_entropy, entropy, start)


def _tanh_network(generator: torch.Generator, scale: float) -> nn.Module:
    sizes = (SIZE, 24, 24, 4)
    layers: list[nn.Module] = []
    for n, m in itertools.pairwise(sizes):
        layer = nn.Linear(n, m)
        with torch.no_grad():
            layer.weight.copy_(scale * torch.randn(m, n, generator=generator) / n**0.5)
            layer.bias.copy_(0.1 * torch.randn(m, generator=generator))
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


PROBLEMS: dict[str, Callable[[], Problem]] = {"quadratic": quadratic, "network": network}


@cache
def _problem(name: str) -> Problem:
    return PROBLEMS[name]()


def optimizer_of(method: str, model: nn.Module, lr: float, seed: int) -> Any:
    """The optimizer of a label, for a run of as many steps as 3,000 forward passes allow."""
    name, options = METHODS[method]
    hyper = {**recipes()[name][1].options, **options, "eps": 1e-3, "lr": lr, "schedule": "plain"}
    make = partial(make_optimizer, name, hyper, model, seed)
    return make(steps_within(FORWARDS, make(FORWARDS)))


def run(problem: str, method: str, lr: float, seed: int) -> list[float]:
    """The loss less the lowest, over the start's, after every 30th of the passes; infinity from
    where it is 20 times the start's."""
    toy = _problem(problem)
    model = toy.start(seed)
    opt = optimizer_of(method, model, lr, seed)
    sign = -1 if METHODS[method][0] == "es" else 1  # rewards: higher is better
    batches = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def excess() -> float:
        return toy.loss(model(toy.x), toy.y).item() - toy.lowest

    first, used = excess(), 0
    losses: list[float] = []
    while len(losses) < POINTS:
        while used < FORWARDS * (len(losses) + 1) / POINTS:
            batch = torch.randint(EXAMPLES, (BATCH,), generator=batches)
            x, y = toy.x[batch], toy.y[batch]

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                nonlocal used
                used += 1
                return sign * toy.loss(model(x), y)

            opt.step(closure)
        now = excess() / first
        if not now < 20:
            return losses + [math.inf] * (POINTS - len(losses))
        losses.append(now)
    return losses


def end(losses: Sequence[float]) -> float:
    """The mean of the last tenth."""
    return mean(losses[-POINTS // 10 :])


def rate(power: int) -> float:
    """Of the grid: 0.01 times a power of sqrt(10)."""
    return float(f"{0.01 * 10 ** (power / 2):.1e}")


def tuned(problem: str, method: str) -> tuple[float, int, list[list[float]]]:
    """The best rate, how many were tried, and the losses of three other seeds with it."""
    torch.set_num_threads(1)

    @cache
    def score(power: int) -> float:
        return end(run(problem, method, rate(power), TUNING_SEED))

    best = 0
    while not math.isfinite(score(best)) and best > -LAST:
        best -= 1
    while better := [p for p in (best - 1, best + 1) if score(p) < score(best)]:
        best = min(better, key=score)
        if abs(best) > LAST:
            raise RuntimeError(f"{method} has no best learning rate as far as {rate(best):g}")
    curves = [run(problem, method, rate(best), seed) for seed in SEEDS]
    return rate(best), score.cache_info().currsize, curves


def as_curve(runs: Sequence[Sequence[float]]) -> Curve:
    """Means and ranges over seeds, from the start on."""
    at = [FORWARDS * point / POINTS for point in range(POINTS + 1)]
    points = [(1.0,) * len(runs), *zip(*runs, strict=True)]
    return Curve(at, list(map(mean, points)), list(map(min, points)), list(map(max, points)))


Row = tuple[float, int, list[list[float]]]


def table(rows: dict[str, Row]) -> str:
    """Of a problem."""
    lines = ["| method | lr | rates tried | loss at the end | speed |", "|---|---|---|---|---|"]
    base = as_curve(next(iter(rows.values()))[2])
    for method, (lr, tried, runs) in rows.items():
        ends = list(map(end, runs))
        told = spread({"mean": mean(ends), "min": min(ends), "max": max(ends)})
        found = speed(as_curve(runs), base)
        cells = method, f"{lr:g}", f"{tried}", told, "-" if found is None else f"{found:.2f}"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found: dict[str, dict[str, Row]], path: Path) -> None:
    """Writes the picture: the speed of every method on both problems."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.22 * len(METHODS) + 1), dpi=150, layout="constrained")
    axes = figure.subplots()
    for marker, (problem, rows) in zip("os", found.items(), strict=False):
        curves = {method: as_curve(row[2]) for method, row in rows.items()}
        speeds = {method: speed(made, curves["MeZO"]) for method, made in curves.items()}
        places = [list(METHODS).index(method) for method, known in speeds.items() if known]
        axes.plot(list(filter(None, speeds.values())), places, marker, label=problem, ms=4)
    axes.axvline(1, color="0.25", ls="--", lw=1)
    axes.set_xscale("log")
    ticks = [0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    axes.minorticks_off()
    axes.set_yticks(range(len(METHODS)), list(METHODS), fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("speed: MeZO's forward passes over the method's, to the same loss")
    axes.grid(color="0.93", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    """Does the runs, two at a time, and writes the page and the picture."""
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    out = parser.parse_args().out
    jobs = [(problem, method) for problem in PROBLEMS for method in METHODS]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        done = list(tqdm(pool.map(tuned, *zip(*jobs, strict=True)), total=len(jobs), disable=None))
    found: dict[str, dict[str, Row]] = {problem: {} for problem in PROBLEMS}
    for (problem, method), row in zip(jobs, done, strict=True):
        found[problem][method] = row
    draw(found, out / "toys.png")
    page = [
        "# Methods on toy problems",
        "`python -m bench.training.toys`",
        "  \n".join(machine.of_cpu()),
        *(text.replace("\n", " ") for text in (__doc__ or "").strip().split("\n\n")[1:]),
        "![speed of every method on both problems](toys.png)",
    ]
    for problem, rows in found.items():
        page += [f"## {problem}", table(rows)]
    (out / "toys.md").write_text("\n\n".join(page) + "\n", encoding="utf-8")
    print((out / "toys.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
