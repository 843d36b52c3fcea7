"""The space of what linear layers are given: the top right singular vectors of their inputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# Columns beyond the rank while a space is looked for: vectors that the last ones kept would
# otherwise be mixed with.
SPARE = 8


def linear_layers(
    module: nn.Module | None, shared: Collection[int] = ()
) -> dict[int, list[nn.Linear]]:
    """The `nn.Linear` layers of a module by the id of their weight, but for weights that something
    else holds as well (a head tied to an embedding), unless they are among `shared`."""
    layers: dict[int, list[nn.Linear]] = {}
    others: set[int] = set()
    for owner in module.modules() if module is not None else ():
        if isinstance(owner, torch.jit.ScriptModule):  # it runs no hooks
            continue
        for name, p in owner._parameters.items():
            if isinstance(owner, nn.Linear) and name == "weight":
                layers.setdefault(id(p), []).append(owner)
            else:
                others.add(id(p))
    return {key: held for key, held in layers.items() if key not in others or key in shared}


class Inputs:
    """Subspace iteration on ``X^T X`` of the inputs X (tokens, n) of layers, a step an evaluation.

    Takes ``4 tokens n columns`` operations an evaluation and three matrices (n, columns) a layer;
    neither X nor ``X^T X`` is kept.

    Args:
        layers: the layers of every weight, by any name for it.
        starts: where to begin (n, columns), float32, for each.
    """

    def __init__(self, layers: Mapping[int, list[nn.Linear]], starts: Mapping[int, Tensor]) -> None:
        self._layers = layers
        self._spaces = {key: _spanning(start) for key, start in starts.items()}
        self._moved: dict[int, Tensor] = {}  # X^T (X Q)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around an evaluation: adds up ``X^T (X Q)`` over all uses of the layers in it.

        Compiled code runs eagerly: it would not see the hooks.
        """
        before = self._moved
        self._moved = {}
        try:
            with ExitStack() as hooks, torch.compiler.set_stance("force_eager"):
                for key, layers in self._layers.items():
                    for layer in layers:
                        hook = partial(self._add, key)
                        handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
                        hooks.callback(handle.remove)
                yield
        except BaseException:
            self._moved = before
            raise

    @torch.no_grad()
    def _add(self, key: int, layer: nn.Module, args: Any, kwargs: Any) -> None:
        given = args[0] if args else kwargs["input"]
        x = given.detach().reshape(-1, given.shape[-1]).float()
        if x.device.type != self._spaces[key].device.type:
            self._spaces[key] = self._spaces[key].to(x.device)
        with torch.autocast(x.device.type, enabled=False):
            moved = x.T @ (x @ self._spaces[key])
        self._moved[key] = self._moved[key] + moved if key in self._moved else moved

    def add_up(self, total: Callable[[Tensor], None]) -> None:
        """What the inputs of several ranks gave, instead of this one's."""
        for key, space in self._spaces.items():
            moved = self._moved.get(key, torch.zeros_like(space))
            total(moved)
            self._moved[key] = moved

    def iterate(self) -> bool:
        """Go on from what the last evaluation gave; False if a layer met a number that is not
        finite."""
        if not all(bool(torch.isfinite(moved).all()) for moved in self._moved.values()):
            return False
        for key, moved in self._moved.items():
            if moved.any():
                self._spaces[key] = _spanning(moved)
        return True

    def top(self, rank: int) -> dict[int, Tensor] | None:
        """The top right singular vectors, float32 (n, rank), after the last evaluation; of the
        layers that were used in it. Columns beyond n are zero. None: as `iterate`."""
        found: dict[int, Tensor] = {}
        for key, moved in self._moved.items():
            if not bool(torch.isfinite(moved).all()):
                return None
            if not bool(moved.any()):
                continue
            moved, space = moved.double().cpu(), self._spaces[key].double().cpu()
            values, vectors = torch.linalg.eigh((space.T @ moved + moved.T @ space) / 2)
            kept = vectors[:, values.argsort(descending=True)[:rank]]
            basis = torch.zeros(len(moved), rank, dtype=torch.float32, device="cpu")
            basis[:, : kept.shape[1]] = torch.linalg.qr(moved @ kept).Q.float()
            found[key] = basis
        return found


def _spanning(matrix: Tensor) -> Tensor:
    """An orthonormal basis, float32, of the columns; any more where they don't suffice, as for
    few tokens, where `zo_fused.directions.orthonormal` has none."""
    return torch.linalg.qr(matrix.double().cpu()).Q.float().to(matrix.device)
