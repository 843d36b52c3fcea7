"""What ranks that take steps together must have in common."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from zo_fused.parallel.groups import Groups
from zo_fused.parallel.ranks import Run
from zo_fused.step.buckets import labels
from zo_fused.step.hyper import names_of
from zo_fused.step.sharded import check_told
from zo_fused.step.weights import Weights


def run_of(weights: Weights) -> Run:
    """The run at present."""
    if not weights.buckets:
        weights.look()
    groups, device = weights.groups, weights.buckets[0].device
    return Run(
        device,
        groups.step,
        groups.restores,
        partial(_about, weights),
        partial(_tuned, weights),
        partial(_check, weights),
    )


def _check(weights: Weights, groups: Groups) -> None:
    """Where ranks share the queries of a step, those with parts of one copy of the weights must be
    together in each."""
    if groups.query is not None:
        check_told(weights.groups.params(), groups)


def _about(weights: Weights) -> dict[str, Any]:
    groups = weights.groups
    buckets = weights.buckets
    hyper = [[group.get(name) for name in names_of(groups.defaults)] for group in groups.all]
    return {
        "noise contract": groups.shared("contract"),
        "method": groups.shared("method"),
        "options": (groups.shared("options"), weights.schedule),
        "seed": groups.seed,
        "step": groups.step,
        "hyper-parameters": [[_plain(value) for value in values] for values in hyper],
        "parameters": [
            (id_, tuple(p.shape), p.dtype)
            for bucket in buckets
            for id_, p in zip(bucket.owner_ids, bucket.owners, strict=True)
        ],
        "parameters that are perturbed in place": sorted(groups.shared("in_place")),
    }


def _plain(value: Any) -> Any:
    """A tensor on the host is compared by its number; for one on a device the host would wait."""
    if not isinstance(value, Tensor):
        return value
    return float(value) if value.device.type == "cpu" else None


def _tuned(weights: Weights) -> dict[str, Tensor]:
    """Those that move, by name."""
    names, params = labels(weights.groups.all), weights.groups.params()
    moving = weights.log.positions(weights.buckets)
    return {names[i]: params[i] for i in moving}
