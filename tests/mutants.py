"""A pytest plugin that plants one fault, named by ZO_FUSED_MUTANT, into the package under test.

`test_mutants.py` runs the suite with each; a suite that stays green proves nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from zo_fused import _ops, directions, dispatch, rules
from zo_fused.optim import base

SWEEPS = ("dense_", "lowrank_", "lowrank_momentum_")


def mutate_sweeps(change: Callable[..., Any], names: tuple[str, ...] = SWEEPS) -> Callable:  # type: ignore[type-arg]
    """Every backend's sweep, with `change(sweep, name, *args)` in its place."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        select = dispatch.select

        def mutated(device_type: str) -> SimpleNamespace:
            backend = select(device_type)
            functions = {n: getattr(backend, n) for n in (*SWEEPS, "bits_", "normal_")}
            for name in names:
                functions[name] = lambda *args, n=name, f=functions[name]: change(f, n, *args)
            return SimpleNamespace(__name__=backend.__name__, **functions)

        mutated.cache_clear = select.cache_clear  # type: ignore[attr-defined]
        patch.setattr(dispatch, "select", mutated)

    return plant


def null_kernel(sweep, name, *args):  # type: ignore[no-untyped-def]
    pass


def wrong_sign(sweep, name, *args):  # type: ignore[no-untyped-def]
    *rest, coeffs, decay = args
    flip = torch.tensor([1.0, 1, -1, -1]) if name == "lowrank_momentum_" else -1
    sweep(*rest, coeffs * flip, decay)


def offset_by_one(sweep, name, outs, ids, offsets, *rest):  # type: ignore[no-untyped-def]
    sweep(outs, ids, offsets + 1, *rest)


def same_noise(sweep, name, outs, ids, *rest):  # type: ignore[no-untyped-def]
    sweep(outs, torch.zeros_like(ids), *rest)


def no_decay(sweep, name, *args):  # type: ignore[no-untyped-def]
    sweep(*args[:-1], torch.ones_like(args[-1]))


def first_direction_only(sweep, name, params, ids, offsets, keys, coeffs, decay):  # type: ignore[no-untyped-def]
    sweep(params, ids, offsets, keys[:1], coeffs[:, :1].contiguous(), decay)


def noise_in_weight_dtype(sweep, name, params, ids, offsets, keys, coeffs, decay):  # type: ignore[no-untyped-def]
    for i, p in enumerate(params):
        for k in range(len(keys)):
            z = torch.empty(p.numel())
            row = slice(i, i + 1)
            dispatch.load("reference").normal_([z], ids[row], offsets[row], keys[k : k + 1])
            p.mul_(decay[i] if k == 0 else 1).add_(coeffs[i, k] * z.view(p.shape).to(p.dtype))


def skipped_restore(patch: pytest.MonkeyPatch) -> None:
    apply = rules.SGD.apply

    def forgetful(self: Any, update: Any, direction: Any, state: Any) -> None:
        update.restore = torch.zeros_like(update.restore)
        apply(self, update, direction, state)

    patch.setattr(rules.SGD, "apply", forgetful)


def skipped_restore_on_error(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(base.ZerothOrderOptimizer, "restore", lambda self: None)


def one_key_for_all_steps(patch: pytest.MonkeyPatch) -> None:
    derive = directions.derive_key
    patch.setattr(
        directions, "derive_key", lambda seed, purpose, step=0, query=0: derive(seed, purpose)
    )


def other_u_in_the_update(patch: pytest.MonkeyPatch) -> None:
    """The generator desync of the released LOZO code, at every step."""
    apply = rules.SGD.apply

    def desynchronised(self: Any, update: Any, direction: Any, state: Any) -> None:
        if isinstance(direction, directions.LowRank):
            update.step += 1
        apply(self, update, direction, state)

    patch.setattr(rules.SGD, "apply", desynchronised)


def applies_non_finite(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch, "isfinite", lambda x: torch.ones_like(x, dtype=torch.bool))


MUTANTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "null kernel": mutate_sweeps(null_kernel),
    "wrong sign": mutate_sweeps(wrong_sign),
    "offset off by one": mutate_sweeps(offset_by_one, ("dense_", "normal_", "bits_")),
    "same noise for two parameters": mutate_sweeps(same_noise, ("dense_", "normal_")),
    "no decay": mutate_sweeps(no_decay),
    "first direction only": mutate_sweeps(first_direction_only, ("dense_",)),
    "noise in the weight's dtype": mutate_sweeps(noise_in_weight_dtype, ("dense_",)),
    "skipped restore": skipped_restore,
    "skipped restore on error": skipped_restore_on_error,
    "one key for all steps": one_key_for_all_steps,
    "other U in the update": other_u_in_the_update,
    "non-finite losses applied": applies_non_finite,
}

_patch = pytest.MonkeyPatch()
if "ZO_FUSED_MUTANT" in os.environ:
    assert _ops.SCHEMAS  # the operators are registered before the fault is planted
    MUTANTS[os.environ["ZO_FUSED_MUTANT"]](_patch)
