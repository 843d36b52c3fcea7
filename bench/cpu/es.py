"""A generation of an evolution strategy without its forward passes, against the formula of
es-at-scale (arXiv 2509.24372) in plain PyTorch.

Both have as many members; the ways take turns on one set of weights. Beside the times stands how
far the two updates are apart, where the plain one is handed the same noise.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import zo_fused
from bench import machine
from bench.models import DTYPES, OPT, opt_parameters
from bench.page import publish
from zo_fused.noise import Purpose, derive_key, normal, parameter_id

SIGMA, LR = 1e-3, 5e-4
Draw = Callable[[Tensor, str, int], Tensor]  # noise of a parameter, its name and the member


def seeded(p: Tensor, name: str, member: int) -> Tensor:
    """As the released code: every parameter from a generator seeded alike."""
    generator = torch.Generator(p.device).manual_seed(member)
    return torch.randn(p.shape, generator=generator, device=p.device, dtype=p.dtype)


def of_zo_fused(p: Tensor, name: str, member: int) -> Tensor:
    """The noise of step 0 of an optimizer with seed 0."""
    key = derive_key(0, Purpose.DENSE, 0, member)
    return normal(p.numel(), key, parameter_id(name)).view(p.shape).to(p.dtype)


def plain(params: dict[str, nn.Parameter], rewards: Sequence[float], draw: Draw = seeded) -> None:
    """A generation: there and back for each member, then the update, a seed after the other."""
    count = len(rewards)
    for member in range(count):
        for sign in (1, -1):
            for name, p in params.items():
                p.data.add_(sign * SIGMA * draw(p, name, member))
    found = torch.tensor(rewards)
    normalized = ((found - found.mean()) / (found.std(correction=0) + 1e-8)).tolist()
    for name, p in params.items():
        update = torch.zeros_like(p)
        for member, score in enumerate(normalized):
            update.add_(draw(p, name, member).mul_(score))
        p.data.add_(LR * update.div_(count))


def times(params: dict[str, nn.Parameter], population: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of each way, in turns."""
    rewards = [float((7 * member) % 5) for member in range(population)]

    def generation(**options: object) -> Callable[[], None]:
        opt = zo_fused.ES(params.items(), lr=LR, eps=SIGMA, population=population, **options)

        def run() -> None:
            given = iter(rewards)
            opt.step(lambda: next(given))

        return run

    ways: dict[str, Callable[[], None]] = {
        "plain": lambda: plain(params, rewards),
        "dense": generation(),
        "dense, hadamard": generation(distribution="hadamard"),
        "dense, antithetic": generation(antithetic=True),
        "lowrank": generation(direction="lowrank"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):  # the first one warms up
        for name, run in ways.items():
            if name == "plain" and not repeat:
                continue
            start = time.perf_counter()
            run()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def apart(model: str, population: int) -> tuple[float, float]:
    """The largest difference of a weight after a generation with the same noise in fp32, and how
    far the largest update goes."""
    rewards = [float((7 * member) % 5) for member in range(population)]
    ours, theirs = opt_parameters(model, torch.float32), opt_parameters(model, torch.float32)
    for name, p in ours.items():
        theirs[name].data.copy_(p.data)
    start = {name: p.detach().clone() for name, p in ours.items()}
    given = iter(rewards)
    zo_fused.ES(ours.items(), lr=LR, eps=SIGMA, population=population).step(lambda: next(given))
    plain(theirs, rewards, of_zo_fused)
    off = max(float((p - theirs[name]).abs().max()) for name, p in ours.items())
    return off, max(float((p - start[name]).abs().max()) for name, p in ours.items())


def rows(model: str, dtypes: list[str], populations: list[int], repeats: int) -> Iterator[str]:
    """Lines of the table."""
    yield "| dtype | members | way | seconds a generation | times as fast |"
    yield "|---|---|---|---|---|"
    for dtype in dtypes:
        params = opt_parameters(model, DTYPES[dtype])
        for population in tqdm(populations, desc=dtype):
            found = times(params, population, repeats)
            base = statistics.median(found["plain"])
            for name, seconds in found.items():
                taken = statistics.median(seconds)
                yield f"| {dtype} | {population} | {name} | {taken:.3g} | {base / taken:.1f} |"


@torch.no_grad()
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="opt-125m", choices=list(OPT))
    parser.add_argument("--dtypes", default="fp32,bf16", help="comma-separated")
    parser.add_argument("--populations", default="8,30", help="comma-separated")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="also write the page to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    off, moved = apart(options.model, 8)
    facts = machine.facts("cpu")
    populations = [int(n) for n in options.populations.split(",")]
    publish(
        [
            f"# A generation of ES without its forward passes, {options.model}",
            "",
            f"{facts['device']}, {options.threads} threads, torch {facts['torch']}, commit "
            f'{facts["commit"]}, {facts["date"]}. Medians of {options.repeats}, in turns. "plain": '
            "es-at-scale's formula in PyTorch.",
            "",
            *rows(options.model, options.dtypes.split(","), populations, options.repeats),
            "",
            f"With the same noise, fp32, 8 members: the weights are at most {off:.2g} apart after "
            f"an update of up to {moved:.2g} (the plain way rounds 16 times on the way).",
        ],
        options.out,
    )


if __name__ == "__main__":
    main()
