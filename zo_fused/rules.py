"""What a projected gradient does to the weights: one class per update rule. Floor 7.

A rule takes back the last perturbation and applies the update in the same sweep. All scalars are
float64 vectors on the bucket's device, one row a parameter; nothing waits for the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from zo_fused import _ops
from zo_fused.directions import Direction, LowRank
from zo_fused.parameters import Bucket


@dataclass
class Update:
    """One step's update of one bucket. Vectors: float64 [P]; `finite`: bool []."""

    bucket: Bucket
    groups: list[dict[str, Any]]
    seed: int
    step: int
    restore: Tensor  # coefficient of z that takes the weights back to theta
    grad: Tensor  # projected gradient, times the direction's update scale
    lr: Tensor
    decay: Tensor  # 1 - lr * weight_decay
    finite: Tensor  # False: only restore
    rounding: Tensor | None  # key of the step's rounding stream, int64 [1]; None: to nearest


class Rule(Protocol):
    """Applies an `Update`. `state` is the optimizer's, keyed by parameter."""

    def apply(self, update: Update, direction: Any, state: dict[Any, Any]) -> None: ...


def _float32(x: Tensor) -> Tensor:
    return x.to(torch.float32)


class SGD:
    """``theta = (1 - lr * weight_decay) * theta - lr * g * z`` from the perturbed weights."""

    def apply(self, update: Update, direction: Direction, state: dict[Any, Any]) -> None:
        u = update
        coeffs = torch.where(u.finite, u.decay * u.restore - u.lr * u.grad, u.restore)
        decay = torch.where(u.finite, u.decay, torch.ones_like(u.decay))
        rows = (_float32(coeffs), _float32(decay))
        direction.sweep(u.bucket, u.groups, u.seed, u.step, *rows, u.rounding)


class FactorMomentum:
    """Momentum kept in the factor (LOZO-M, arXiv 2410.07698):

    ``N = beta * N + (1 - beta) * g * U``, ``theta = (1 - lr * weight_decay) * theta - lr * N V^T``.

    At a new window the old momentum is projected on the new V by least squares,
    ``N = N (V_old^T V_new) / n`` (V_new^T V_new is about n times the identity).

    State per parameter: ``momentum_factor``, float32 (m, rank). V_old is not kept but made anew.
    """

    def apply(self, update: Update, direction: LowRank, state: dict[Any, Any]) -> None:
        u, bucket = update, update.bucket
        us, vs = direction.factors(bucket, u.groups, u.seed, u.step)
        moments = []
        for row, (p, factor) in enumerate(zip(bucket.params, us, strict=True)):
            entry = state[p]
            if "momentum_factor" not in entry:
                entry["momentum_factor"] = torch.zeros_like(factor)
            moments.append(entry["momentum_factor"])
            interval = u.groups[bucket.group[row]]["interval"]
            if u.step > 0 and u.step % interval == 0 and p.dim() >= 2:
                old = direction.previous_v(bucket, u.groups, u.seed, u.step, row)
                moments[row].copy_(project(moments[row], old, vs[row]))
        betas = torch.tensor([group["momentum"] for group in u.groups], dtype=torch.float64)
        beta = bucket.rows(betas)
        one, zero = torch.ones_like(beta), torch.zeros_like(beta)
        columns = (
            torch.where(u.finite, beta, one),
            torch.where(u.finite, (1 - beta) * u.grad, zero),
            torch.where(u.finite, u.decay * u.restore, u.restore),
            torch.where(u.finite, -u.lr, zero),
        )
        coeffs = _float32(torch.stack(columns, dim=-1))
        decay = _float32(torch.where(u.finite, u.decay, one))
        rows = (coeffs, decay, bucket.ids, bucket.offsets)
        _ops.lowrank_momentum_(bucket.params, moments, us, vs, *rows, u.rounding)


GRID = 2.0**40  # |v_old * v_new| < 44, so 2**17 rows sum below 2**63


def project(moment: Tensor, v_old: Tensor, v_new: Tensor) -> Tensor:
    """``moment @ (v_old.T @ v_new) / n`` through the r x r product, float32 (m, r).

    Bit for bit the same on every device: the sum over n runs on a fixed-point grid (integers add
    in any order), the sum over r in a fixed order in float64.
    """
    n, rank = v_new.shape
    parts = max(1, -(-n // (1 << 17)))
    product = torch.zeros(rank, rank, dtype=torch.float64, device=v_new.device)
    for old, new in zip(v_old.chunk(parts), v_new.chunk(parts), strict=True):
        for q in range(rank):
            terms = old[:, q, None].double() * new.double() * GRID
            product[q] += terms.round().to(torch.int64).sum(0).double() / GRID
    product /= n
    total = torch.zeros(moment.shape, dtype=torch.float64, device=moment.device)
    for q in range(rank):
        total += moment[:, q, None].double() * product[q]
    return total.float()
