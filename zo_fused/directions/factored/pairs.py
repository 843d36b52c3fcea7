"""Both signs in one run of a function, batched over the sign by `torch.vmap`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _functorch as functorch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

_OF_VMAP = ("vmap", "atching rule", "doesn't have storage", "functorch transform")
_NEEDS = "paired=True needs a model that torch.vmap can batch"


def run_pair(function: Callable[..., Any], stacks: Sequence[Sequence[Tensor]]) -> Tensor:
    """``[function(*[[t[i] for t in stack] for stack in stacks]) for i in (0, 1)]`` in one run.

    Random numbers drawn from torch's generators are the same for both. Compiled code runs eagerly:
    the compiler would take it apart, as it does not trace through a vmap that is already open.

    Args:
        function: takes a list of tensors for every stack; returns a scalar tensor.
        stacks: tensors [2, ...], at least one.

    Raises:
        TypeError: the function returns something else than a scalar tensor, or calls ``.item()``.
        RuntimeError: it does something that cannot be batched.
    """

    def scalar(*lists: list[Tensor]) -> Tensor:
        result = function(*lists)
        if not isinstance(result, Tensor):
            raise TypeError(
                f"paired=True needs a closure that returns the loss as a tensor, "
                f"got {type(result).__name__}: .item() and float() cannot be batched"
            )
        if result.numel() != 1:
            raise TypeError(
                f"the closure must return a scalar loss, got shape {tuple(result.shape)}"
            )
        return result.reshape(())

    try:
        with torch.compiler.set_stance("force_eager"), _Batched():
            return torch.vmap(scalar, randomness="same")(*map(list, stacks))
    except RuntimeError as error:
        reason = str(error)
        if ".item()" in reason:
            raise TypeError(
                "paired=True needs a closure that returns the loss as a tensor: "
                f".item() and float() cannot be batched ({reason})"
            ) from error
        if any(part in reason for part in _OF_VMAP):
            experts = "nonzero" in reason or "grouped_mm" in reason
            cure = "experts_implementation='batched_mm', or " if experts else ""
            raise RuntimeError(f"{_NEEDS}: {reason}; use {cure}paired=False") from error
        raise


_NORMS = (F.layer_norm, F.group_norm, F.rms_norm)


class _Batched(TorchFunctionMode):
    """What vmap has no rule for, or one that does something else.

    Runs F.scaled_dot_product_attention for both signs as one batch: there is no rule for the CPU's
    kernel, and those for others draw a dropout mask for each sign, whatever `randomness` says.
    Norms in float32 give 16-bit inputs their dtype back; the rules would hand on float32.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        out = func(*args, **kwargs)
        if func in _NORMS:
            return out.to((args[0] if args else kwargs["input"]).dtype)
        return out


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    options: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    attend: Callable[..., Tensor] = F.scaled_dot_product_attention
    if dropout_p > 0:
        with sdpa_kernel(SDPBackend.MATH):  # made of operators that vmap has rules for
            return attend(query, key, value, attn_mask, dropout_p, **options)
    if query.dim() != 4:
        return attend(query, key, value, attn_mask, **options)

    def as_one_batch(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = attn_mask
    ) -> Tensor:
        signs, rows = query.shape[:2]
        if mask is not attn_mask and mask is not None:  # each sign has its own
            while mask.dim() < 5:
                mask = mask.unsqueeze(1)
            mask = mask.expand(-1, rows, -1, -1, -1).flatten(0, 1)
        elif mask is not None and mask.dim() == 4 and len(mask) > 1:
            mask = mask.repeat(signs, 1, 1, 1)
        folded = (tensor.flatten(0, 1) for tensor in (query, key, value))
        return attend(*folded, mask, **options).unflatten(0, (signs, rows))

    inputs = [query, key, value]
    if attn_mask is not None and functorch.is_batchedtensor(attn_mask):
        inputs.append(attn_mask)
    out = _by_sign(as_one_batch, *inputs)
    return attend(query, key, value, attn_mask, **options) if out is None else out


def add_product(out: Tensor, inner: Tensor, outer: Tensor, bias: Tensor | None) -> Tensor:
    """``out + inner outer^T + bias`` under vmap, in the memory of `out` where that can be.

    Args:
        out: [..., m], which nothing else uses.
        inner, outer, bias: [..., r], [m, r], [m]; all in the dtype of `out`.
    """

    def in_place(out: Tensor, inner: Tensor, outer: Tensor, bias: Tensor | None = None) -> Tensor:
        signs, rows, rank = outer.shape
        out = out.contiguous()  # if it was shared by the signs, it had no room for both
        flat = out.view(signs, -1, rows)
        flat.baddbmm_(inner.reshape(signs, -1, rank), outer.mT)
        if bias is not None:
            flat += bias[:, None]
        return out

    added = _by_sign(in_place, out, inner, outer, *([] if bias is None else [bias]))
    return out + F.linear(inner, outer, bias) if added is None else added


def _by_sign(rule: Callable[..., Tensor], *tensors: Tensor) -> Tensor | None:
    """What `rule` makes of the tensors with the sign as first axis: a rule for vmap.

    The public way to give vmap a rule, `torch.autograd.Function`, takes several times as long on
    the host.

    Returns:
        None if the rule does not apply: the tensors are batched in several ways, or not at all.
    """
    levels = {functorch.maybe_get_level(t) for t in tensors if functorch.is_batchedtensor(t)}
    if len(levels) != 1:
        return None
    dims = [functorch.maybe_get_bdim(t) if functorch.is_batchedtensor(t) else -1 for t in tensors]
    plain = [
        functorch.get_unwrapped(t) if dim >= 0 else t for t, dim in zip(tensors, dims, strict=True)
    ]
    if any(map(functorch.is_batchedtensor, plain)):
        return None
    signs = next(t.shape[dim] for t, dim in zip(plain, dims, strict=True) if dim >= 0)
    out = rule(
        *(
            t.movedim(dim, 0) if dim >= 0 else t.expand(signs, *t.shape)
            for t, dim in zip(plain, dims, strict=True)
        )
    )
    return functorch._add_batch_dim(out, 0, levels.pop())
