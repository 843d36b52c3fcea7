"""Low-rank directions beside the weights: a window of steps without writing them.

Within a window V is fixed, so the weights of its steps are ``scale * W + X V^T`` with X (m, rank)
in float32: a perturbation and an update change X, the forward pass adds ``(x V) X^T`` to what W
gives, and W is written once, at the window's end. No perturbation is ever rounded to 16 bits, and
updates add up in float32. Where U is made of coordinates (`zo_fused.directions.forms`), they are
what is kept, and X is made of them for the forward pass.

One-dimensional parameters, those with more than two dimensions and those that the model uses in a
way that has no side path are perturbed in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from zo_fused.directions.factored.side_paths import SidePaths
from zo_fused.directions.factors import Factors, Pair, StepFactors, parts_of
from zo_fused.directions.low_rank import LowRank
from zo_fused.step.buckets import Bucket
from zo_fused.step.direction import Beside, Sweep, Term
from zo_fused.step.vectors import Vector, float32

# V / 64 and 64 X take part in the forward pass: in float16, x V of large activations would overflow
# and small X be subnormal; a power of two changes nothing else.
FORWARD_SCALE = 64.0


class Kept:
    """What is kept beside the weights of a bucket: coordinates X, as `Factors` draws them."""

    def __init__(self, bucket: Bucket, factors: Factors) -> None:
        self._factors = factors
        self.x, self.xs = factors.buffer(factors.shapes)
        count, device = len(bucket.params), bucket.device
        self.scale = torch.ones(count, dtype=torch.float32, device=device)
        self.step: StepFactors | None = None  # whose V belongs to X; None: X is zero, scale one
        # as the forward pass reads them: in the dtype of each weight
        self.bs = self._in_dtype_of(bucket, factors.u_shapes)
        self.vs = self._in_dtype_of(bucket, factors.v_shapes)
        self._window: tuple[int, ...] | None = None  # whose V is in `vs`

    def _in_dtype_of(self, bucket: Bucket, shapes: Sequence[tuple[int, int]]) -> ForwardFactors:
        made = {p.dtype: self._factors.buffer(shapes, p.dtype) for p in bucket.params}
        parts = [made[p.dtype][1][i] for i, p in enumerate(bucket.params)]
        return ForwardFactors([flat for flat, _ in made.values()], parts)

    def add(self, seed: int, terms: Sequence[Term], decay: Vector) -> None:
        """``scale, X = decay * scale, decay * X + sum of coeff * factor``."""
        spread = self._factors.spread
        self.scale.mul_(float32(decay))
        self.x.mul_(spread(decay))
        for term in terms:
            self.step = self._factors.of(seed, term.step, term.query)
            factor = self.step.flat if term.factor is None else term.factor
            self.x.add_(spread(term.coeffs) * factor)
        assert self.step is not None
        self.bs.fill(self._factors.lifted((self.x, self.xs), self.step)[0], FORWARD_SCALE)
        self.use(self.step)

    def use(self, step: StepFactors) -> None:
        """The forward pass takes the V of this step."""
        if self._window != step.windows:
            self._window = step.windows
            self.vs.fill(step.flat_v, 1 / FORWARD_SCALE)

    def pair(self, step: StepFactors, move: Tensor) -> list[Tensor]:
        """U of ``X + move`` and ``X - move`` of every weight, [2, m, rank] in its dtype."""
        factors = self._factors
        sides = [
            factors.lifted((x, parts_of(x, factors.shapes)), step, number)[0]
            for number, x in enumerate((self.x + move, self.x - move))
        ]
        both = torch.stack(sides) * FORWARD_SCALE
        sizes = [b.numel() for b in self.bs.parts]
        parts = {dtype: both.to(dtype).split(sizes, dim=1) for dtype in self.bs.dtypes}
        return [parts[b.dtype][i].view(2, *b.shape) for i, b in enumerate(self.bs.parts)]

    def clear(self) -> None:
        """After the weights were written."""
        self.x.zero_()
        self.bs.clear()  # a loss at theta is taken before anything is added
        self.scale.fill_(1.0)
        self.step = None


class ForwardFactors:
    """Copies of a flat factor in the dtypes of the weights."""

    def __init__(self, flats: list[Tensor], parts: list[Tensor]) -> None:
        self._flats = flats
        self.parts = parts

    @property
    def dtypes(self) -> list[torch.dtype]:
        return [flat.dtype for flat in self._flats]

    def fill(self, flat: Tensor, factor: float) -> None:
        for copy in self._flats:
            torch.mul(flat, factor, out=copy)

    def clear(self) -> None:
        for copy in self._flats:
            copy.zero_()


class Factored(LowRank, Beside):
    """`LowRank` directions; see the top of this file. For others that are derived from `LowRank`,
    ``class BesideOther(Factored, Other): pass``.

    Args:
        module: the model that the closure evaluates; None: nothing can be evaluated (replay).
        paired: evaluate both signs in one forward pass.
        options: of the direction.
    """

    fixed: tuple[str, ...] = (*LowRank.fixed, "weight_decay")

    def __init__(
        self,
        module: nn.Module | None,
        paired: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.module = module
        self.paired = paired
        self._reset()

    def _reset(self) -> None:
        self._paths: SidePaths | None = None
        self._of: list[Bucket] = []  # what the side paths were made for
        self._watched = False  # whether an evaluation was watched for other uses of the weights
        self._attached = ExitStack()
        self._attached_to: Sequence[Bucket] = []

    def __getstate__(self) -> dict[str, Any]:
        made_anew = {"_paths", "_of", "_watched", "_attached", "_attached_to", "state"}
        return {name: value for name, value in self.__dict__.items() if name not in made_anew}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def not_sharded(self) -> str:
        if self.paired:
            return "both signs in one forward pass need it whole: paired=False"
        return super().not_sharded()

    def _beside(self, bucket: Bucket) -> Kept:
        return bucket.once("beside", lambda: Kept(bucket, self.factors(bucket)))

    def sweep(self, sweep: Sweep) -> None:
        if not sweep.bucket.beside:
            super().sweep(sweep)
        elif (rest := self.after_probes(sweep)) is not None:
            self._beside(rest.bucket).add(rest.seed, rest.terms, rest.decay)

    def not_capturable(self, deferred: bool) -> str:
        return 'whether a window ends is for the host to say; mode="inplace"'

    def window_ends(self, bucket: Bucket, step: int) -> bool:
        return any((step + 1) % group["interval"] == 0 for group in bucket.fixed)

    def pending(self, bucket: Bucket) -> bool:
        return bucket.beside and self._beside(bucket).step is not None

    def settle(self, bucket: Bucket, rounding: Tensor | None) -> bool:
        if not self.pending(bucket):
            return False
        kept = self._beside(bucket)
        assert kept.step is not None
        key = ("settle", kept.step.number)
        _, us = self.factors(bucket).lifted((kept.x, kept.xs), kept.step)
        us, vs = self.turned(bucket, us, kept.step.vs)
        if bucket.rows is not None:
            us, vs = bucket.rows.parts_of(us, "rows"), bucket.rows.parts_of(vs, "columns")
        sweep = bucket.prepared("lowrank_", us, vs, key=key)
        sweep(torch.ones_like(kept.scale), kept.scale, rounding)
        kept.clear()
        return True

    # ---- evaluation -----------------------------------------------------------------------------

    def out_of_reach(self, buckets: Sequence[Bucket]) -> list[tuple[Tensor, str]]:
        if self.module is None:
            return []
        paths = self._side_paths(buckets)
        reasons = dict(paths.left_out)
        first = 0
        for bucket in buckets:
            if bucket.beside and bucket.rows is not None:
                for row in bucket.rows.cut_along_columns():
                    reasons.setdefault(first + row, "is cut along its columns")
            first += len(bucket.params) if bucket.beside else 0
        return [(paths.params[i], reason) for i, reason in reasons.items()]

    def attach(self, buckets: Sequence[Bucket]) -> None:
        if buckets is self._attached_to:  # from one sign to the other
            return
        self._attached.close()
        self._attached_to = buckets
        if buckets and self.module is not None:
            self._attached.enter_context(self._side_paths(buckets).attached())

    def watching(self) -> AbstractContextManager[None]:
        paths = self._paths
        return nullcontext() if paths is None or self._watched else self._watching(paths)

    @contextmanager
    def _watching(self, paths: SidePaths) -> Iterator[None]:
        with paths.watching():
            yield
        self._watched = True

    def both(self, sweeps: Sequence[Sweep], closure: Callable[[], Any]) -> Tensor:
        """In one run of the closure; nothing is moved.

        Parameters that are not beside theirs are copied, once for each sign.
        """
        bs: list[Tensor | None] = []
        values: list[tuple[Tensor, Tensor]] = []
        for bucket, seed, (term,), *_ in sweeps:
            factors = self.factors(bucket)
            now = factors.of(seed, term.step, term.query)
            if bucket.beside:
                kept = self._beside(bucket)
                kept.use(now)
                bs += kept.pair(now, factors.spread(term.coeffs) * now.flat)
            else:
                _, us = factors.lifted((now.flat, now.parts), now)
                values += self._moved_copies(bucket, (us, now.vs), now.number, term.coeffs)
        return self._side_paths([sweep.bucket for sweep in sweeps]).both(closure, bs, values)

    @staticmethod
    def _moved_copies(
        bucket: Bucket, factors: Pair, number: int, eps: Vector
    ) -> list[tuple[Tensor, Tensor]]:
        copies = bucket.once("copies", lambda: [p.new_empty(2, *p.shape) for p in bucket.params])
        for side, coeffs in enumerate((float32(eps), float32(-eps))):
            halves = [pair[side] for pair in copies]
            torch._foreach_copy_(halves, bucket.params)
            sweep = bucket.prepared("lowrank_", *factors, key=(side, number), params=halves)
            sweep(coeffs, torch.ones_like(coeffs))
        return list(zip(bucket.params, copies, strict=True))

    def _side_paths(self, buckets: Sequence[Bucket]) -> SidePaths:
        assert self.module is not None
        beside = [bucket for bucket in buckets if bucket.beside]
        if self._paths is None or beside != self._of:
            params, vs, bs, scales = [], [], [], []
            for bucket in beside:
                kept = self._beside(bucket)
                params += [bucket.owner_of(row) for row in range(len(bucket.params))]
                left, right = self.turned(bucket, kept.bs.parts, kept.vs.parts)
                vs += right
                bs += left
                scales += [
                    scale if bucket.fixed[group]["weight_decay"] else None
                    for scale, group in zip(kept.scale.unbind(), bucket.group_of, strict=True)
                ]
            self._paths = SidePaths(self.module, params, vs, bs, scales)
            self._of, self._watched = beside, False
        return self._paths
