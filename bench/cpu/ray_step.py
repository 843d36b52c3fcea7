"""What a step of `zo_fused.ray` costs beside the rewards, on a cluster on this machine: time, and
bytes of what goes to actors and comes back. Needs Ray (`make test-ray` installs it)."""

from __future__ import annotations

import argparse
import logging
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import zo_fused
from bench import machine
from bench.page import publish, table


def make() -> tuple[nn.Module, Callable[[int], float]]:
    torch.manual_seed(0)
    return nn.Linear(32, 32), lambda step: random.random()


def sizes(population: int, actors: int) -> dict[str, int]:
    """Pickled, as Ray sends them, without what Ray adds."""
    from ray import cloudpickle

    members = list(range(0, population, actors))
    return {
        "asked": len(cloudpickle.dumps((1000, members))),
        "answered": len(cloudpickle.dumps([0.1] * len(members))),
        "told": len(cloudpickle.dumps([0.1] * population)),
    }


def row(population: int, actors: int, steps: int, folder: str) -> dict[str, Any]:
    log = Path(folder) / f"{population}-{actors}"
    driver = zo_fused.ray.Driver(make, log, actors, population=population)
    taken = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        driver.step()
        taken.append(1e3 * (time.perf_counter() - start))
    driver.close()
    found = {"population": population, "actors": actors, "ms": statistics.median(taken[2:])}
    return found | sizes(population, actors)


def main() -> None:
    """Command line."""
    import ray

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--population", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, help="also write the page to this file")
    options = parser.parse_args()
    environment = {"env_vars": {"PYTHONPATH": f"{Path.cwd()}:{Path.cwd()}/kernels"}}
    ray.init(
        num_cpus=max(options.actors),
        include_dashboard=False,
        runtime_env=environment,
        logging_level=logging.ERROR,
    )
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            row(population, actors, options.steps, folder)
            for population in options.population
            for actors in options.actors
        ]
    facts = machine.facts("cpu")
    names = {
        "population": "population",
        "actors": "actors",
        "ms": "ms a step",
        "asked": "bytes to an actor: members",
        "answered": "back: rewards",
        "told": "to an actor: the step",
    }
    publish(
        [
            "# A step of zo_fused.ray beside its rewards",
            "",
            f"{facts['device']}, a cluster on this machine, Ray {ray.__version__}, commit "
            f"{facts['commit']}, {facts['date']}; the load of the machine at the end was "
            f"{os.getloadavg()[1]:.0f}. A model of 1056 weights; medians of {options.steps} steps; "
            "bytes as pickled, without what Ray adds.",
            "",
            *table(rows, names),
        ],
        options.out,
    )


if __name__ == "__main__":
    main()
