"""`zo_fused.ray` on a local cluster of two workers, which `make test-ray` installs Ray for."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zo_fused

pytest.importorskip("ray")
pytestmark = pytest.mark.slow  # a cluster is started

OPTIONS: dict[str, Any] = {"lr": 0.05, "eps": 0.02, "population": 6, "seed": 3}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    import ray

    path = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "tests"))
    environment = {"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}}
    ray.init(num_cpus=3, include_dashboard=False, runtime_env=environment, log_to_driver=False)
    yield ray
    ray.shutdown()


def made(
    folder: Path, dtype: torch.dtype = torch.float32
) -> Callable[[], tuple[nn.Module, Callable[[int], float]]]:
    """A model, and a reward that does once in a step what a file of its name says."""

    def make() -> tuple[nn.Module, Callable[[int], float]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
        inputs = torch.randn(10, 6, generator=torch.Generator().manual_seed(1)).to(dtype)

        def reward(step: int) -> float:
            for what in ("sleep", "die", "raise"):
                try:
                    os.rename(folder / f"{what}-{step}", folder / f"{what}-{step}-{os.getpid()}")
                except FileNotFoundError:
                    continue
                if what == "die":
                    os._exit(1)
                if what == "raise":
                    raise ZeroDivisionError("a reward failed")
                wait_for(folder / "awake")
            return -float(model(inputs).float().square().mean())

        return model, reward

    return make


def wait_for(file: Path) -> None:
    for _ in range(600):
        if file.exists():
            return
        time.sleep(0.1)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().float().flatten() for p in model.parameters()])


def replayed(make: Any, log: Path) -> torch.Tensor:
    model, _ = make()
    zo_fused.replay(model, log)
    return weights(model)


KINDS: list[dict[str, Any]] = [
    {"antithetic": True, "shaping": "centered_rank"},
    {"direction": "lowrank", "rank": 2, "rounding": "stochastic", "weight_decay": 0.1},
]


@pytest.mark.parametrize("kind", KINDS)
def test_actors_follow_by_scalars_alone(kind: dict[str, Any], cluster: Any, tmp_path: Path) -> None:
    """In bfloat16, where in-place perturbations would leave traces; and a run of one actor, which
    goes on from the log, gives the same bits."""
    make = made(tmp_path, torch.bfloat16)
    ends = []
    for parts in ([(2, 8)], [(1, 3), (2, 5)]):
        log = tmp_path / f"log-{len(parts)}"
        for actors, steps in parts:
            options = OPTIONS | kind
            driver = zo_fused.ray.Driver(make, log, actors, check_every=2, **options)
            rewards = [float(driver.step()) for _ in range(steps)]
            driver.close()
        assert driver.optimizer.step_count == 8
        assert driver.missed == 0
        assert torch.equal(weights(driver.model), replayed(make, log))
        ends.append(weights(driver.model))
    assert torch.equal(*ends)
    assert rewards[-1] > -0.2  # they climb


def test_what_comes_late_is_dropped_and_its_actor_follows(cluster: Any, tmp_path: Path) -> None:
    make, log = made(tmp_path), tmp_path / "log"
    driver = zo_fused.ray.Driver(make, log, deadline=1.0, check_every=1, **OPTIONS)
    (tmp_path / "sleep-1").touch()
    driver.step()
    driver.step()
    assert driver.missed == 3
    assert (driver.optimizer.projected_grad == 0).sum() == 3
    driver.step()  # by the other one alone
    assert driver.missed == 3
    (tmp_path / "awake").touch()
    while len(driver._free()) < 2:
        time.sleep(0.1)
    driver.step()  # which compares all
    driver.close()
    assert torch.equal(weights(driver.model), replayed(make, log))


def test_who_dies_is_replaced_and_who_is_new_catches_up(cluster: Any, tmp_path: Path) -> None:
    make, log = made(tmp_path), tmp_path / "log"
    driver = zo_fused.ray.Driver(make, log, check_every=1, **OPTIONS)
    driver.step()
    (tmp_path / "die-1").touch()
    driver.step()
    assert driver.missed == 3
    driver.add()
    while len(driver._free()) < 3:
        time.sleep(0.1)
    driver.step()
    assert driver.missed == 3
    driver.close()
    assert torch.equal(weights(driver.model), replayed(make, log))


def test_a_reward_that_fails_is_an_error_here(cluster: Any, tmp_path: Path) -> None:
    driver = zo_fused.ray.Driver(made(tmp_path), tmp_path / "log", **OPTIONS)
    (tmp_path / "raise-0").touch()
    before = weights(driver.model)
    with pytest.raises(ZeroDivisionError, match="a reward failed"):
        driver.step()
    assert torch.equal(weights(driver.model), before)
    driver.step()  # and once more
    driver.close()
