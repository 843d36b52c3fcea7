"""Update rules with element-wise moments of the estimate ``g z``: momentum, Adam, sign. Floor 8.

The estimate is made in registers, in the sweep that also restores and updates; only the moments are
stored. Directions are dense. A step that is skipped leaves the moments as they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from zo_fused.directions import Direction
from zo_fused.keys import Stream, stream_keys
from zo_fused.parameters import Bucket
from zo_fused.rules import SGD, Update
from zo_fused.streams import Purpose

STATE_DTYPES = ("float32", "param")


def check_state_dtype(state_dtype: str) -> str:
    """Raises ValueError for what is none."""
    if state_dtype not in STATE_DTYPES:
        raise ValueError(f"state_dtype must be one of {STATE_DTYPES}, got {state_dtype!r}")
    return state_dtype


def kept(
    bucket: Bucket, state: dict[Any, Any], name: str, state_dtype: str = "float32"
) -> list[Tensor]:
    """A moment of every parameter, zero at first."""

    def make() -> list[Tensor]:
        for p in bucket.params:
            if name not in state[p]:
                dtype = p.dtype if state_dtype == "param" else torch.float32
                state[p][name] = torch.zeros_like(p, dtype=dtype, requires_grad=False)
        return [state[p][name] for p in bucket.params]

    return bucket.once(name, make)


def _sweep(
    update: Update,
    rule: str,
    moments: list[list[Tensor]],
    beta: Tensor,
    gain: Tensor,
    beta2: Tensor,
    gain2: Tensor,
    eps: Tensor,
    step: Tensor,
) -> None:
    """``m = beta m + gain g z``, ``v = beta2 v + gain2 (g z)^2`` and
    ``p = decay p + restore z + step s`` with s of the rule; and the next perturbation."""
    u, zero = update, torch.zeros_like(update.lr)
    steps = [u.step]
    grads = [u.if_finite(u.grad, 0.0)]
    restores = [u.if_finite(u.decay * u.restore, u.restore)]
    if u.ahead is not None:
        steps, grads, restores = [u.step, u.step + 1], [*grads, zero], [*restores, u.ahead]
    columns = (
        u.if_finite(beta, 1.0),
        u.if_finite(gain, 0.0),
        u.if_finite(beta2, 1.0),
        u.if_finite(gain2, 0.0),
        u.if_finite(eps, 1.0),
        u.if_finite(step, 0.0),
    )
    streams = [Stream(Purpose.DENSE, step) for step in steps]
    u.bucket.sweep("moments_", *moments, key=rule)(
        stream_keys(u.seed, streams, u.bucket.device),
        torch.stack(grads, dim=-1).float(),
        torch.stack(restores, dim=-1).float(),
        torch.stack(columns, dim=-1).float(),
        u.if_finite(u.decay, 1.0).float(),
        rule,
        u.rounding,
    )


class Momentum:
    """``m = beta m + (1 - dampening) g z``, ``theta = (1 - lr weight_decay) theta - lr m``.

    State per parameter: ``momentum``, of its shape.
    """

    not_capturable = ""

    def __init__(self, state_dtype: str) -> None:
        self.state_dtype = check_state_dtype(state_dtype)

    def apply(self, update: Update, direction: Direction, state: dict[Any, Any]) -> None:
        u = update
        beta = u.bucket.hyper(u.groups, "momentum")
        gain = 1 - u.bucket.hyper(u.groups, "dampening")
        zero = torch.zeros_like(beta)
        m = kept(u.bucket, state, "momentum", self.state_dtype)
        _sweep(u, "momentum", [m, []], beta, gain, zero, zero, zero, -u.lr)


class Adam:
    """``m = beta1 m + (1 - beta1) g z``, ``v = beta2 v + (1 - beta2) (g z)^2``,
    ``theta = (1 - lr weight_decay) theta - lr m' / (sqrt(v') + eps)`` with the bias-corrected
    ``m' = m / (1 - beta1^t)``, ``v' = v / (1 - beta2^t)``; t counts steps that were not skipped.

    State per parameter: ``exp_avg`` and ``exp_avg_sq`` of its shape, ``step``: t, float64 [].
    """

    not_capturable = ""

    def __init__(self, state_dtype: str) -> None:
        self.state_dtype = check_state_dtype(state_dtype)

    def apply(self, update: Update, direction: Direction, state: dict[Any, Any]) -> None:
        u, bucket = update, update.bucket
        beta1, beta2 = (bucket.constant([g["betas"][i] for g in u.groups]) for i in (0, 1))
        eps = bucket.hyper(u.groups, "adam_eps")
        t = bucket.once("step", lambda: self._steps(bucket, state))
        t.add_(u.finite)
        root = (1 - beta2**t).sqrt()
        # lr m' / (sqrt(v') + eps) = (lr root / (1 - beta1^t)) m / (sqrt(v) + eps root)
        step = -u.lr * root / (1 - beta1**t)
        m = kept(bucket, state, "exp_avg", self.state_dtype)
        v = kept(bucket, state, "exp_avg_sq")
        _sweep(u, "adam", [m, v], beta1, 1 - beta1, beta2, 1 - beta2, eps * root, step)

    @staticmethod
    def _steps(bucket: Bucket, state: dict[Any, Any]) -> Tensor:
        """t of every parameter in one tensor, whose elements the state then holds."""
        t = torch.zeros(len(bucket.params), dtype=torch.float64, device=bucket.device)
        for p, part in zip(bucket.params, t.unbind(), strict=True):
            if "step" in state[p]:
                part.copy_(state[p]["step"])
            state[p]["step"] = part
        return t


class Sign:
    """``theta = (1 - lr weight_decay) theta - lr sign(g z)``, element by element. No state."""

    not_capturable = ""

    def apply(self, update: Update, direction: Direction, state: dict[Any, Any]) -> None:
        u = update
        one, zero = torch.ones_like(u.lr), torch.zeros_like(u.lr)
        _sweep(u, "sign", [[], []], zero, one, zero, zero, zero, -u.lr)


class ScalarSign:
    """``theta = (1 - lr weight_decay) theta - lr sign(g) z``. No state."""

    not_capturable = ""

    def apply(self, update: Update, direction: Direction, state: dict[Any, Any]) -> None:
        u = update
        SGD().apply(replace(u, grad=u.grad.sign()), direction, state)
