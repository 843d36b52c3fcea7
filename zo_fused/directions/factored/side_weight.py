"""A weight that stands for ``scale W + B V^T`` without being written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_batchedtensor

from zo_fused.directions.factored.pairs import add_product
from zo_fused.step.direction import UsedOtherwise
from zo_fused.step.guard import METADATA, reading


class SideWeight(Tensor):
    """Stands in for a weight W (m, n); functions of it compute with ``scale W + B V^T``.

    It lives on the meta device: code that takes it past `__torch_function__` (an extension in C++)
    meets no data and fails, instead of computing with W alone.

    Attributes:
        param: the parameter it stands for.
        raw: W itself, or W^T if this is the transpose.
        b: B (m, r) in the dtype of W, or [2, m, r] batched over the sign while both signs run.
        v: V (n, r), likewise.
        scale: tensor [], or None for 1.
        transposed: what ``.t()`` gives, or None.
        paired: whether B is batched over the sign.
    """

    param: Tensor
    raw: Tensor
    b: Tensor
    v: Tensor
    scale: Tensor | None
    transposed: SideWeight | None
    paired: bool

    @staticmethod
    def make(
        raw: Tensor, b: Tensor, v: Tensor, scale: Tensor | None, param: Tensor | None = None
    ) -> SideWeight:
        """The stand-in of a parameter (m, n), with its transpose.

        Args:
            param: the parameter, where W is what was gathered of it.
        """
        param = raw if param is None else param
        # (scale W + B V^T)^T = scale W^T + V B^T: the transpose is a side weight with B and V
        # exchanged. It has no transpose of its own, which would make a cycle of references.
        transposed = _stand_in(param, raw.detach().t(), v, b, scale, None)
        return _stand_in(param, raw, b, v, scale, transposed)

    def set_b(self, b: Tensor, paired: bool) -> None:
        """Another tensor for B, here and in the transpose."""
        assert self.transposed is not None
        self.b = self.transposed.v = b
        self.paired = self.transposed.paired = paired

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            return func(args[0].raw, *args[1:], **kwargs)
        if torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling():
            # The compiler itself looks at the tensor; nothing is computed. In code that it traces,
            # `is_dynamo_compiling` is true.
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        use = _USES.get(func)
        if use is not None and "out" not in kwargs:
            result = use(*args, **kwargs)
            if result is not None:
                return result
        raise UsedOtherwise(_first(args, kwargs).param, function_name(func))


def function_name(func: Callable[..., Any]) -> str:
    """What to call a function that `__torch_function__` was given; ``data`` for Tensor.data."""
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__"):
        return getattr(getattr(func, "__self__", None), "__name__", name)
    return name


def _stand_in(
    param: Tensor,
    raw: Tensor,
    b: Tensor,
    v: Tensor,
    scale: Tensor | None,
    transposed: SideWeight | None,
) -> SideWeight:
    weight = raw.detach().to("meta").as_subclass(SideWeight)
    weight.param, weight.raw, weight.b, weight.v = param, raw, b, v
    weight.scale, weight.transposed, weight.paired = scale, transposed, False
    return weight


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> SideWeight:
    for value in (*args, *kwargs.values()):
        for inner in value if isinstance(value, list | tuple) else (value,):
            if isinstance(inner, SideWeight):
                return inner
    raise TypeError("zo_fused: a weight was handed over in a container of containers")


# ---- what may be asked about a weight -----------------------------------------------------------


# ---- what may be computed with a weight ---------------------------------------------------------
# Each takes the arguments of the function it stands for; None says that the use has no side path.


def _linear(input: Any, weight: Any, bias: Any = None) -> Tensor | None:
    """``x W^T + bias``."""
    if not isinstance(weight, SideWeight):
        return None
    return _product(input, weight, weight.raw, weight.v, weight.b, bias)


def _matmul(input: Any, other: Any, bias: Any = None) -> Tensor | None:
    """``x W + bias``."""
    if not isinstance(other, SideWeight):
        return None
    return _product(input, other, other.raw.t(), other.b, other.v, bias)


def _product(
    input: Any, weight: SideWeight, raw: Tensor, into: Tensor, out_of: Tensor, bias: Any
) -> Tensor | None:
    if isinstance(input, SideWeight) or isinstance(bias, SideWeight):
        return None
    x = input if weight.scale is None else input * weight.scale
    inner = input @ into
    if weight.paired:  # vmap would split the bias off anyway, and add it out of place
        return _add(F.linear(x, raw), inner, out_of, True, bias)
    return _add(F.linear(x, raw, bias), inner, out_of, False)


def _embedding(
    input: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor | None:
    """Rows of ``scale W + B V^T``. `max_norm` would write to W."""
    if max_norm is not None:
        return None
    out = F.embedding(input, weight.raw)
    if weight.scale is not None:
        out = out * weight.scale
    return _add(out, F.embedding(input, weight.b), weight.v, weight.paired)


def _aten_embedding(weight: Any, indices: Any, *options: Any, **more: Any) -> Tensor | None:
    return _embedding(indices, weight)  # the options tell gradients what to do


def _addmm(input: Any, mat1: Any, mat2: Any, **factors: Any) -> Tensor | None:
    """``input + mat1 W``, the form of GPT-2's Conv1D."""
    return None if factors else _matmul(mat1, mat2, input)


def _rmatmul(self: Any, other: Any) -> Tensor | None:
    return _matmul(other, self)


def _t(input: Any) -> Tensor | None:
    return input.transposed


def _to(self: Any, *args: Any, **kwargs: Any) -> Tensor | None:
    """Only where it would return the weight itself."""
    if kwargs or len(args) != 1 or args[0] not in (self.raw.dtype, self.raw.device):
        return None
    return self


def _add(
    out: Tensor, inner: Tensor, outer: Tensor, paired: bool, bias: Tensor | None = None
) -> Tensor:
    """``out + inner outer^T``; the last axis of `inner` and `outer` is the rank.

    In place where that can be: the logits of a large vocabulary are the largest tensor of all.
    Under autocast `out` may have another dtype than the factors.
    """
    inner, outer = inner.to(out.dtype), outer.to(out.dtype)
    if paired:
        return add_product(out, inner, outer, None if bias is None else bias.to(out.dtype))
    if is_batchedtensor(out) or not out.is_contiguous():  # vmap has no rule for addmm_
        return out + F.linear(inner, outer)
    rows, rank = outer.shape
    out.view(-1, rows).addmm_(inner.reshape(-1, rank), outer.t())
    return out


_USES: dict[Any, Callable[..., Tensor | None]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    torch.embedding: _aten_embedding,
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    Tensor.__rmatmul__: _rmatmul,
    torch.mm: _matmul,
    Tensor.mm: _matmul,
    torch.t: _t,
    Tensor.t: _t,
    reading("T"): _t,
    reading("mT"): _t,
    Tensor.to: _to,
}
