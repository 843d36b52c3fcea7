"""Right factors from data instead of noise: AGZO and ZO-Act."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zo_fused.directions.inputs import SPARE, Inputs, linear_layers
from zo_fused.noise.streams import Purpose, derive_key
from zo_fused.step.buckets import Bucket
from zo_fused.sweeps.conversions import int64_tensor
from zo_fused.sweeps.inspection import normal

# Evaluations that the first basis takes, a step of the subspace iteration each. Later ones begin
# at the one before and take one.
FIRST_PASSES = 3


class Activations:
    """V of a matrix from what its linear layer is given: ``V = sqrt(n) A``, A (n, rank) the top
    right singular vectors of the inputs (AGZO, arXiv 2601.17261; ZO-Act, 2607.01125).

    The gradient of ``x W^T`` is (gradients of outputs)^T X: its rows lie in the span of the inputs.
    ``V^T V = n I``, as that of LOZO's V is about, so lr and eps mean the same.

    State per parameter: ``basis``: V, float32 (n, rank), or with no rows where nothing was seen;
    ``basis_step``: the step that it was made in, int64 []; with `refresh` also ``basis_before``,
    which was in use before.

    Args:
        module: the model that the closure evaluates.
        refresh: steps after which V is made anew; None: it stays for the run.
        still: whether a layer of which nothing was seen stays as it is; else its V is random.
        unit: V is A, without the factor sqrt(n).
        shared: weights that other modules may hold, too.

    Attributes:
        found: how often `find` has found something.
    """

    def __init__(
        self,
        module: nn.Module | None,
        refresh: int | None,
        still: bool,
        unit: bool = False,
        shared: Sequence[Tensor] = (),
    ) -> None:
        self.module = module
        self.unit = unit
        self._shared = list(shared)
        self.refresh = refresh
        self.found = 0
        self._still = still
        self._read: Any = None  # what a replay has handed over
        self._written: tuple[list[Tensor], list[Any]] = ([], [])

    def layers(self) -> dict[int, list[nn.Linear]]:
        """Those that are looked at, by the id of their weight."""
        return linear_layers(self.module, {id(p) for p in self._shared})

    def right(self, state: dict[str, Any], step: int) -> Tensor | None:
        """V of a parameter in a step; None: it is random."""
        if "basis" not in state:
            return None
        old = step < int(state["basis_step"])
        basis: Tensor | None = state.get("basis_before") if old else state["basis"]
        return basis if basis is not None and len(basis) else None

    def wanting(
        self, buckets: Sequence[Bucket], state: dict[Any, Any], step: int
    ) -> dict[int, tuple[Tensor, int, int]]:
        """The weights of linear layers that need a new V in this step, with their ids in the noise
        and their ranks, by the id of the object."""
        everyone = [
            (p, id_, bucket.fixed[group]["rank"])
            for bucket in buckets
            for p, id_, group in zip(bucket.params, bucket.id_list, bucket.group_of, strict=True)
            if p.dim() == 2 and self._is_due(state.get(p, {}), step)
        ]
        if not everyone:
            return {}
        layers = self.layers()
        return {id(p): (p, id_, rank) for p, id_, rank in everyone if id(p) in layers}

    def _is_due(self, state: dict[str, Any], step: int) -> bool:
        if "basis" not in state:
            return True
        made = int(state["basis_step"])
        return self.refresh is not None and made // self.refresh != step // self.refresh

    def find(
        self,
        wanting: dict[int, tuple[Tensor, int, int]],
        state: dict[Any, Any],
        seed: int,
        step: int,
        evaluate: Callable[[Callable[[], AbstractContextManager[None]]], Any],
        total: Callable[[Tensor], None] | None = None,
    ) -> bool:
        """Give these weights a new V.

        Args:
            evaluate: evaluates the model at theta, within a context that it makes each time.
            total: makes the sum over ranks of a tensor: V is of the inputs of all.

        Returns:
            False, and nothing is changed, if an input was not finite.
        """
        starts = {}
        for key, (p, id_, rank) in wanting.items():
            n = p.shape[1]
            columns = min(n, rank + SPARE)
            noise = normal(n * columns, derive_key(seed, Purpose.TEST, step), id_).view(n, columns)
            known = self.right(state[p], step)
            if known is not None:
                noise = torch.cat([known.cpu(), noise[:, rank:]], dim=1)
            starts[key] = noise.to(p.device)
        everywhere = self.layers()
        inputs = Inputs({key: everywhere[key] for key in wanting}, starts)
        first = any("basis" not in state[p] for p, _, _ in wanting.values())
        for again in range(FIRST_PASSES if first else 1):
            if again and not inputs.iterate():
                return False
            evaluate(inputs.watched)
            if total is not None:
                inputs.add_up(total)
        found: dict[int, Tensor] = {}
        for rank in {rank for _, _, rank in wanting.values()}:
            tops = inputs.top(rank)
            if tops is None:
                return False
            found |= {key: top for key, top in tops.items() if wanting[key][2] == rank}
        for key, (p, _, rank) in wanting.items():
            if key in found:
                basis = found[key] * (1 if self.unit else math.sqrt(len(found[key])))
            elif "basis" in state[p]:
                basis = state[p]["basis"]  # an expert that got no token: as it was
            else:
                shape = (p.shape[1] if self._still else 0, rank)
                basis = torch.zeros(shape, dtype=torch.float32, device=p.device)
            self._put(state[p], basis.to(p.device), step)
        self.found += 1
        return True

    def _put(self, state: dict[str, Any], basis: Tensor, step: int) -> None:
        if "basis" in state and self.refresh is not None:
            state["basis_before"] = state["basis"]
        state.update(basis=basis, basis_step=int64_tensor([step])[0])

    # ---- the replay log -------------------------------------------------------------------------

    def to_json(self, params: Sequence[Tensor], state: dict[Any, Any]) -> list[Any]:
        """``[position, V as base64 of float32, little endian, row by row]`` of the parameters, and
        the rows that move where not all do."""
        kept = {i: state[p]["basis"] for i, p in enumerate(params) if "basis" in state.get(p, {})}
        before, lines = self._written
        bases = list(kept.values())
        if len(before) != len(bases) or any(a is not b for a, b in zip(before, bases, strict=True)):
            lines = [
                [i, _text(basis), *(rows.tolist() for rows in _rows(state[params[i]]))]
                for i, basis in kept.items()
            ]
            self._written = bases, lines
        return lines

    def from_json(
        self,
        lines: Sequence[Any],
        params: Sequence[Tensor],
        ranks: Sequence[int],
        state: dict[Any, Any],
        step: int,
    ) -> bool:
        """What `to_json` gave, in the step that first used it; False if it is known.

        Raises:
            ValueError: it is not of these parameters.
        """
        if lines is self._read:
            return False
        known = {} if self._read is None else {line[0]: line[1] for line in self._read}
        for position, text, *rows in lines:
            if known.get(position) == text and position in known and self.refresh is None:
                continue
            p, rank = params[position], ranks[position]
            flat = np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float32)
            if p.dim() != 2 or flat.size not in (0, p.shape[1] * rank):
                raise ValueError(
                    f"the log has a basis of {flat.size} numbers for a parameter of shape "
                    f"{list(p.shape)} and rank {rank}"
                )
            self._put(state[p], torch.from_numpy(flat).view(-1, rank).to(p.device), step)
            for moving in rows:
                if max(moving, default=0) >= len(p):
                    raise ValueError(f"the log has a row {max(moving)} of a matrix with {len(p)}")
                state[p]["rows"] = int64_tensor(moving).to(p.device)
        self._read = lines
        return True


def _rows(state: dict[str, Any]) -> list[Tensor]:
    """The rows of a parameter that move, if not all do."""
    return [state["rows"]] if "rows" in state else []


def _text(basis: Tensor) -> str:
    return base64.b64encode(basis.cpu().numpy().astype("<f4").tobytes()).decode("ascii")
