"""A pytest plugin that runs the collected tests once for every fault that it can plant.

Every run is a fork, ends at the first test that fails, and writes that test's name, a line of JSON,
to the file that ZO_FUSED_MUTANTS names. At last those tests run with a fault that changes nothing.
`test_mutants.py` reads the lines: a suite that stays green proves nothing.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from zo_fused.directions import low_rank, tape
from zo_fused.noise import keys
from zo_fused.rules import sgd
from zo_fused.step import schedule, weights
from zo_fused.sweeps import dispatch, operators

SWEEPS = ("dense_", "lowrank_", "lowrank_momentum_", "moments_")


def mutate_sweeps(change: Callable[..., Any], names: tuple[str, ...] = SWEEPS) -> Callable:  # type: ignore[type-arg]
    """Every backend's sweep, with `change(sweep, name, *args)` in its place."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        select = dispatch.select

        def mutated(device_type: str) -> SimpleNamespace:
            attributes = dict(vars(select(device_type)))
            attributes.pop("prepare", None)  # prepared sweeps then go through these, too
            for name in names:
                attributes[name] = lambda *args, n=name, f=attributes[name]: change(f, n, *args)
            return SimpleNamespace(**attributes)

        mutated.cache_clear = select.cache_clear  # type: ignore[attr-defined]
        patch.setattr(dispatch, "select", mutated)

    return plant


def harmless(sweep, name, *args):  # type: ignore[no-untyped-def]
    sweep(*args)


def null_kernel(sweep, name, *args):  # type: ignore[no-untyped-def]
    pass


# Where a sweep's arguments are: its coefficients, decay and rounding key.
COEFFS = {"dense_": 4, "lowrank_": 3, "lowrank_momentum_": 4, "moments_": 8}
DECAY = {name: position + 1 for name, position in COEFFS.items()}
ROUNDING = {"dense_": 6, "lowrank_": 7, "lowrank_momentum_": 8, "moments_": 11}


def with_argument(args, position, change):  # type: ignore[no-untyped-def]
    """The arguments with one of them changed, if it is given."""
    args = list(args)
    args[position : position + 1] = [change(x) for x in args[position : position + 1]]
    return args


def wrong_sign(sweep, name, *args):  # type: ignore[no-untyped-def]
    flip = {"lowrank_momentum_": [1.0, 1, -1, -1], "moments_": [1.0, 1, 1, 1, 1, -1]}.get(name, -1)
    sweep(*with_argument(args, COEFFS[name], lambda x: x * torch.tensor(flip)))


def offset_by_one(sweep, name, outs, ids, offsets, *rest):  # type: ignore[no-untyped-def]
    sweep(outs, ids, offsets + 1, *rest)


def same_noise(sweep, name, outs, ids, *rest):  # type: ignore[no-untyped-def]
    sweep(outs, torch.zeros_like(ids), *rest)


def no_decay(sweep, name, *args):  # type: ignore[no-untyped-def]
    sweep(*with_argument(args, DECAY[name], torch.ones_like))


def never_stochastic(sweep, name, *args):  # type: ignore[no-untyped-def]
    sweep(*with_argument(args, ROUNDING[name], lambda key: None))


def one_rounding_stream(sweep, name, *args):  # type: ignore[no-untyped-def]
    sweep(*with_argument(args, ROUNDING[name], lambda key: key and torch.zeros_like(key)))


def forgotten_moments(sweep, name, params, firsts, seconds, *rest):  # type: ignore[no-untyped-def]
    sweep(params, [x.clone() for x in firsts], [x.clone() for x in seconds], *rest)


def first_direction_only(sweep, name, params, ids, offsets, keys, coeffs, *rest):  # type: ignore[no-untyped-def]
    sweep(params, ids, offsets, keys[:1], coeffs[:, :1].contiguous(), *rest)


def one_rounding_of_a_script(sweep, name, params, *rest):  # type: ignore[no-untyped-def]
    wide = [p.float() for p in params]
    sweep(wide, *rest)
    for p, w in zip(params, wide, strict=True):
        p.copy_(w)


def waiting_sweeps_lost(patch: pytest.MonkeyPatch) -> None:
    """What waits for a pass when the parameters change."""

    def forgetful(self: Any) -> None:
        self._tapes = {}

    patch.setattr(tape.DenseRecorder, "leave", forgetful)


def noise_in_weight_dtype(sweep, name, params, ids, offsets, keys, coeffs, decay, *options):  # type: ignore[no-untyped-def]
    for i, p in enumerate(params):
        for k in range(len(keys)):
            z = torch.empty(p.numel())
            row = slice(i, i + 1)
            dispatch.load("reference").normal_([z], ids[row], offsets[row], keys[k : k + 1])
            p.mul_(decay[i] if k == 0 else 1).add_(coeffs[i, k] * z.view(p.shape).to(p.dtype))


def skipped_restore(patch: pytest.MonkeyPatch) -> None:
    apply = sgd.SGD.apply

    def forgetful(self: Any, update: Any, direction: Any, state: Any) -> None:
        update.restore = torch.zeros_like(update.restore)
        apply(self, update, direction, state)

    patch.setattr(sgd.SGD, "apply", forgetful)


def skipped_restore_on_error(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(weights.Weights, "flush", lambda self: None)


def one_key_for_all_steps(patch: pytest.MonkeyPatch) -> None:
    derive = keys.derive_key
    patch.setattr(keys, "derive_key", lambda seed, purpose, step=0, query=0: derive(seed, purpose))


def other_u_in_the_update(patch: pytest.MonkeyPatch) -> None:
    """The generator desync of the released LOZO code, at every step."""
    apply = sgd.SGD.apply

    def desynchronised(self: Any, update: Any, direction: Any, state: Any) -> None:
        if isinstance(direction, low_rank.LowRank):
            update.step += 1
        apply(self, update, direction, state)

    patch.setattr(sgd.SGD, "apply", desynchronised)


def applies_non_finite(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(weights, "judged", lambda grads: (grads, False))


def one_key_for_all_queries(patch: pytest.MonkeyPatch) -> None:
    derive = keys.derive_key
    patch.setattr(
        keys, "derive_key", lambda seed, purpose, step=0, query=0: derive(seed, purpose, step)
    )


def only_the_last_query(patch: pytest.MonkeyPatch) -> None:
    apply = sgd.SGD.apply

    def forgetful(self: Any, update: Any, direction: Any, state: Any) -> None:
        update.grads[:-1] = [0 * grad for grad in update.grads[:-1]]
        apply(self, update, direction, state)

    patch.setattr(sgd.SGD, "apply", forgetful)


def all_blocks_move(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(schedule.Schedule, "block_of", lambda self, blocks, step, query=0: None)


MUTANTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "null kernel": mutate_sweeps(null_kernel),
    "wrong sign": mutate_sweeps(wrong_sign),
    "offset off by one": mutate_sweeps(offset_by_one, ("dense_", "normal_", "bits_")),
    "same noise for two parameters": mutate_sweeps(same_noise, ("dense_", "normal_")),
    "no decay": mutate_sweeps(no_decay),
    "first direction only": mutate_sweeps(first_direction_only, ("dense_",)),
    "noise in the weight's dtype": mutate_sweeps(noise_in_weight_dtype, ("dense_",)),
    "a script rounds once": mutate_sweeps(one_rounding_of_a_script, ("dense_steps_",)),
    "waiting sweeps lost": waiting_sweeps_lost,
    "never rounded stochastically": mutate_sweeps(never_stochastic),
    "one rounding stream for all keys": mutate_sweeps(one_rounding_stream),
    "moments not kept": mutate_sweeps(forgotten_moments, ("moments_",)),
    "skipped restore": skipped_restore,
    "skipped restore on error": skipped_restore_on_error,
    "one key for all steps": one_key_for_all_steps,
    "other U in the update": other_u_in_the_update,
    "non-finite losses applied": applies_non_finite,
    "one key for all queries": one_key_for_all_queries,
    "only the last query counts": only_the_last_query,
    "all blocks move": all_blocks_move,
}

# The tests that must fail; the others see none of these.
SUITES = {
    "a script rounds once": "test_fused_replay.py",
    "waiting sweeps lost": "test_fused_replay.py",
    "one key for all queries": "test_queries.py",
    "only the last query counts": "test_queries.py",
    "all blocks move": "test_queries.py",
}
USUAL = ("test_ops.py", "test_optim.py", "test_noise.py")
HARMLESS = "none"


class Run:
    """What the fork writes."""

    def __init__(self, mutant: str) -> None:
        self.mutant = mutant
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and report.when == "call":  # not an error of the planting itself
            self.failed.append(report.nodeid)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        line = json.dumps([self.mutant, session.testscollected, self.failed])
        with Path(os.environ["ZO_FUSED_MUTANTS"]).open("a") as file:
            file.write(line + "\n")


def selected(items: list[pytest.Item], mutant: str, killers: list[str]) -> list[pytest.Item]:
    if mutant == HARMLESS:
        return [item for item in items if item.nodeid in killers]
    suite = SUITES.get(mutant)
    return [item for item in items if item.path.name in ((suite,) if suite else USUAL)]


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> object:
    assert operators.dense_  # the operators are registered before a fault is planted
    found = Path(os.environ["ZO_FUSED_MUTANTS"])
    gc.freeze()  # the forks share what was collected
    for mutant, plant in {**MUTANTS, HARMLESS: mutate_sweeps(harmless)}.items():
        if pid := os.fork():
            os.waitpid(pid, 0)
            continue
        written = found.read_text().splitlines() if found.exists() else []
        killers = [name for line in written for name in json.loads(line)[2]]
        session.items[:] = selected(session.items, mutant, killers)
        session.testscollected = len(session.items)
        session.config.pluginmanager.register(Run(mutant))
        plant(pytest.MonkeyPatch())
        return None  # the usual loop goes on, in the fork
    return True
