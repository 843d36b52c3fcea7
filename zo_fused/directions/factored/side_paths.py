"""Low-rank perturbations beside the weights: a module computes with ``scale W + B V^T``.

While `SidePaths.attached` is open, the module holds a `SideWeight` wherever it holds one of the
parameters. This reaches every use through `module`, tied weights and functional calls included.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from zo_fused.directions.factored.gathered import Beside, Gathered
from zo_fused.directions.factored.pairs import run_pair
from zo_fused.directions.factored.side_weight import SideWeight, function_name
from zo_fused.directions.factored.stand_ins import Places
from zo_fused.step.direction import UsedOtherwise
from zo_fused.step.guard import METADATA
from zo_fused.sweeps.shards import is_sharded


class SidePaths:
    """The side paths of some weights of a module.

    Args:
        module: what the closure runs.
        params: weights W (m, n).
        vs, bs: V (n, r) and B (m, r) of each, in the dtype of W. Their values are read in every
            forward pass, so they may be rewritten in place between passes.
        scales: a tensor [] or None (for 1) of each, likewise.

    Attributes:
        left_out: index in `params` -> why it has no side path: it is no matrix, or no submodule
            holds it. The module uses these parameters as they are.
        names: index -> where the module holds the parameter: ``["lm_head.weight", ...]``.
    """

    def __init__(
        self,
        module: nn.Module,
        params: Sequence[Tensor],
        vs: Sequence[Tensor],
        bs: Sequence[Tensor],
        scales: Sequence[Tensor | None],
    ) -> None:
        self.params = list(params)
        self.left_out: dict[int, str] = {}
        self._bs = list(bs)
        self._module = module
        self._places = Places(module)
        self._weights: dict[int, SideWeight] = {}
        shards = [p for p in params if is_sharded(p)]
        self._gathered = Gathered(module, self._places, shards)
        self._shards: dict[int, Beside] = {}  # by the id of a parameter
        for i, (p, v, b, scale) in enumerate(zip(params, vs, bs, scales, strict=True)):
            if p.dim() != 2:
                self.left_out[i] = f"has {p.dim()} dimensions"
            elif p not in self._places:
                self.left_out[i] = "is held by no submodule"
            elif id(p) in self._gathered.left_out:
                self.left_out[i] = self._gathered.left_out[id(p)]
            elif is_sharded(p):
                self._shards[id(p)] = Beside(p, b, v, scale)
            else:
                self._weights[i] = SideWeight.make(p, b, v, scale)

    @property
    def names(self) -> dict[int, list[str]]:
        return {i: self._places.names(p) for i, p in enumerate(self.params) if p in self._places}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """While open, `module` computes with ``scale W + B V^T``.

        Raises:
            UsedOtherwise: (in the block) a weight is used in a way that has no side path.
        """
        gathered = self._gathered.attached(self._shards)
        with self._places.holding(self._stand_ins()), gathered:
            yield

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While open, also watch for uses of the weights that don't go through `module`.

        `attached` does not reach a parameter that the closure, another module or a plain list
        holds, and what it computes there would lack the side path. Compiled code runs
        eagerly and every operation takes longer, so this is for the first evaluation. What was
        made from a parameter beforehand, such as a view of it, escapes this watch too.

        Raises:
            UsedOtherwise: (in the block) a weight itself goes into a function.
        """
        whole = [self.params[i] for i in self._weights]
        shards = [beside.param for beside in self._shards.values()]
        watch = _Watch([*whole, *shards], self._gathered.raw)
        with torch.compiler.set_stance("force_eager"), self._gathered.watching(), watch:
            yield

    def both(
        self,
        closure: Callable[[], Any],
        pair_bs: Sequence[Tensor | None],
        pair_values: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> Tensor:
        """The losses at both signs, in one run of the closure.

        Args:
            closure: returns a scalar tensor.
            pair_bs: B of both signs, [2, m, r], in the order of `params`; None where left out.
            pair_values: other parameters and their values at both signs, [2, *shape].

        Returns:
            The losses, in their own dtype, [2].

        Raises:
            UsedOtherwise: as in `attached`.
            ValueError: no submodule holds a parameter of `pair_values`.
            TypeError, RuntimeError: see `zo_fused.directions.factored.pairs.run_pair`.
        """
        for p, _ in pair_values:
            if p not in self._places:
                raise ValueError(
                    f"paired=True needs all parameters inside the module, and none of its "
                    f"submodules holds one of shape {tuple(p.shape)}; use paired=False"
                )
        weights = list(self._weights.values())
        factors = [b for i, b in enumerate(pair_bs) if b is not None and i in self._weights]
        others = [p for p, _ in pair_values]

        def run(bs: list[Tensor], values: list[Tensor]) -> Any:
            for weight, b in zip(weights, bs, strict=True):
                weight.set_b(b, paired=True)
            stand_ins = {id(p): value for p, value in zip(others, values, strict=True)}
            with self._places.holding(self._stand_ins() | stand_ins):
                return closure()

        try:
            return run_pair(run, [factors, [value for _, value in pair_values]])
        finally:
            for i, weight in self._weights.items():
                weight.set_b(self._bs[i], paired=False)

    def _stand_ins(self) -> dict[int, Tensor]:
        return {id(self.params[i]): weight for i, weight in self._weights.items()}


class _Watch(TorchFunctionMode):
    """Raises where a parameter itself, not its stand-in, goes into a function."""

    def __init__(self, params: Sequence[Tensor], gathered: dict[int, Tensor]) -> None:
        self._params = ChainMap({id(p): p for p in params}, gathered)  # which fills in a pass

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in METADATA:
            for value in (*args, *kwargs.values()):
                for inner in value if isinstance(value, list | tuple) else (value,):
                    if id(inner) in self._params:
                        raise UsedOtherwise(self._params[id(inner)], function_name(func))
        return func(*args, **kwargs)
