"""Other tensors in place of a module's parameters, while something is computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Places:
    """Where a module holds its parameters: a tied one in several places."""

    def __init__(self, module: nn.Module) -> None:
        self._of: dict[int, list[tuple[nn.Module, str, str]]] = {}
        for path, owner in module.named_modules():
            if isinstance(owner, torch.jit.ScriptModule):
                continue  # compiled code reads its own copy of the table
            for key, p in owner._parameters.items():
                if p is not None:
                    self._of.setdefault(id(p), []).append((owner, path, key))

    def __contains__(self, param: Tensor) -> bool:
        return id(param) in self._of

    def of(self, param: Tensor) -> list[tuple[nn.Module, str, str]]:
        """The modules that hold it, their paths, and its names there."""
        return self._of.get(id(param), [])

    def names(self, param: Tensor) -> list[str]:
        """Such as ``["lm_head.weight", "model.embed_tokens.weight"]``."""
        return [f"{path}.{key}" if path else key for _, path, key in self._of.get(id(param), [])]

    @contextmanager
    def holding(self, stand_ins: Mapping[int, Tensor]) -> Iterator[None]:
        """Put tensors where the module holds parameters. The module may hold other stand-ins.

        `nn.Module.__setattr__` takes parameters only, hence the table itself.

        Args:
            stand_ins: id of a parameter -> tensor.

        Raises:
            RuntimeError: the module holds another parameter than when this object was made.
        """
        swapped = []
        try:
            for key, stand_in in stand_ins.items():
                for owner, path, name in self._of[key]:
                    held = owner._parameters.get(name)
                    if id(held) != key and isinstance(held, nn.Parameter | None):
                        raise RuntimeError(
                            f"zo_fused: {path}.{name} holds another parameter than it did when "
                            "this step was prepared"
                        )
                    swapped.append((owner._parameters, name, held))
                    owner._parameters[name] = stand_in  # type: ignore[assignment]
            yield
        finally:
            for table, name, param in reversed(swapped):
                table[name] = param
