"""What a model and a step of a method take in memory, from a configuration alone.

Weights are counted as tensors without data. What an optimizer keeps beside them is asked of the
optimizer itself: it takes steps on small matrices, and as its bytes are ``a + b m + c n + d m n``
for a matrix (m, n) that has the rank of the method, four of them give those of any; as a to d are
quadratic in the rank, three small ranks give those of a large one, whose factors take a while.
Activations are an estimate: the model's own forward pass runs on tensors without data, and what
would be alive at a time is added up.
"""

from __future__ import annotations

import gc
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zo_fused.directions.factors import Factors
from zo_fused.directions.inputs import linear_layers
from zo_fused.task.encoding import Encoded
from zo_fused.task.errors import UserError, first_line, optional
from zo_fused.task.masked import MaskScorer
from zo_fused.task.models import check_kind, fills_masks
from zo_fused.task.scoring import Scorer

Shapes = Counter[tuple[int, ...]]
Make = Callable[..., Any]
SMALL = (3, 4, 5)  # ranks that are tried in place of one above 8


class Kept(NamedTuple):
    """Bytes of an optimizer."""

    state: int  # in its state_dict
    beside: int  # all that it holds between steps, its state included
    peak: int  # at most where losses are taken, but for what a forward pass needs


class Live(TorchDispatchMode):
    """Adds up the bytes of tensors that are made under it and still alive.

    Args:
        known: tensors that were there before, on the device that counts.
    """

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._device = known[0].device
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device == self._device:
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._seen:
            return
        self._seen.add(address)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._seen.discard(address)
        self.now -= size


class _FusedAttention(TorchFunctionMode):
    """Attention as the fused kernels have it: nothing of the size of (length, length) is kept."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = (*args, *(kwargs.get(n) for n in ("query", "key", "value")))[:3]
        return _attend(query, key, value)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        *batch, heads, length, _ = query.shape
        # tokens before heads, as the kernels have it: joining the heads then takes no copy
        out = query.new_empty(*batch, length, heads, value.shape[-1]).transpose(-2, -3)
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError


_attend = _Attend.apply


class Outline:
    """A model of a configuration, without its weights.

    Raises:
        UserError: it is none that can be tuned, or needs more than a configuration.
    """

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        check_kind(config)
        self._config, self._dtype = config, dtype
        self._masked = fills_masks(config)
        self._fake = FakeTensorMode()
        try:
            self.model = self._make(dtype)
        except Exception as error:  # a configuration can be wrong in any way
            raise UserError(f"the configuration makes no model: {first_line(error)}") from error

    def _make(self, dtype: torch.dtype) -> Any:
        transformers = optional("transformers")
        kind = "AutoModelForMaskedLM" if self._masked else "AutoModelForCausalLM"
        with self._fake:
            return getattr(transformers, kind).from_config(self._config, dtype=dtype).eval()

    def shapes(self) -> Shapes:
        """How often which shape is among the parameters; tied weights are there once."""
        return Counter(tuple(p.shape) for p in self.model.parameters())

    def linear(self) -> Shapes:
        """The same of the weights that linear layers alone hold."""
        known = linear_layers(self.model)
        return Counter(tuple(p.shape) for p in self.model.parameters() if id(p) in known)

    def activations(
        self, batch_size: int, length: int, backward: bool = False, fused: bool = True
    ) -> int | None:
        """Bytes alive at most in a forward pass over a batch, as `Scorer` makes it; an estimate.

        Args:
            backward: with what autograd keeps for backpropagation, without checkpoints.
            fused: whether attention is one kernel; else all its operators are counted.

        Returns:
            None: the model looks at values, so it can't run without them.
        """
        try:
            return self._run(self.model, batch_size, length, backward, fused)
        except Exception as error:  # in code that was not written for tensors without values
            if "BF16" not in str(error):
                return None
        # matrix products of experts, of which torch only knows the shapes in this dtype
        try:
            found = self._run(self._make(torch.bfloat16), batch_size, length, backward, fused)
        except Exception:
            return None
        return found * self._dtype.itemsize // 2

    def _run(self, model: Any, batch_size: int, length: int, backward: bool, fused: bool) -> int:
        example = Encoded([1] * length, 0)
        attention = _FusedAttention() if fused else sdpa_kernel(SDPBackend.MATH)
        model.requires_grad_(backward)
        with self._fake:
            scorer: Scorer = (
                MaskScorer(model, [[0], [1]], pad_id=0, mask_id=1)
                if self._masked
                else Scorer(model, [[0], [1]], pad_id=0)
            )
            known = (*model.parameters(), *model.buffers())
            with attention, Live(known) as live, torch.set_grad_enabled(backward):
                scorer.loss(scorer.batch([example] * batch_size))
        return live.peak


def step_peak(
    weights: int, held: Kept, forward: int | None, paired: bool, differentiates: bool
) -> int | None:
    """Bytes at most within a step, weights included; an estimate.

    Args:
        weights: their bytes.
        held: by the optimizer.
        forward: `Outline.activations`; where the step differentiates, without fused attention.
        paired: whether both signs are in one forward pass.
        differentiates: whether every activation has its tangent beside it.

    Returns:
        None: `forward` is.
    """
    if forward is None:
        return None
    return weights + held.peak + forward * (2 if paired or differentiates else 1)


# ---- optimizers ----------------------------------------------------------------------------------


class _Small(nn.Module):
    """Some parameters of one shape, perhaps of linear layers."""

    def __init__(
        self, shape: tuple[int, ...], count: int, dtype: torch.dtype, linear: bool
    ) -> None:
        super().__init__()
        self.parts = nn.ModuleList()
        for _ in range(count):
            if linear:
                part: nn.Module = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)
            elif len(shape) == 2:
                part = nn.Embedding(*shape, dtype=dtype)
            else:
                part = nn.ParameterList([torch.zeros(shape, dtype=dtype)])
            self.parts.append(part)

    def forward(self) -> Tensor:
        total = torch.zeros((), dtype=torch.float32)
        for part in self.parts:
            if isinstance(part, nn.Linear):
                row = torch.ones(1, part.in_features, dtype=part.weight.dtype)
                total = total + part(row).float().sum()  # hardly any activations
            elif isinstance(part, nn.Embedding):
                total = total + part(torch.zeros(0, dtype=torch.int64)).float().sum()
            else:
                total = total + next(part.parameters())[:0].float().sum()
        return total


def _held(make: Make, shape: tuple[int, ...], count: int, dtype: torch.dtype, linear: bool) -> Kept:
    model = _Small(shape, count, dtype, linear)
    with Live(tuple(model.parameters())) as live:
        optimizer = make(model)
        numbers = itertools.count()  # losses that are all equal may skip a step
        at_losses = [0]

        def closure() -> Tensor:
            at_losses.append(live.now)
            return model() + next(numbers)

        if any(group["params"] for group in optimizer.param_groups):  # else it leaves them alone
            for _ in range(3):  # the buffers of two steps take turns
                optimizer.step(closure)
        gc.collect()
    tensors = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    # Tangents are made within the loss. Else a peak in between is not looked at: it is that of one
    # matrix after another, and comes at another place with three of them than with four.
    peak = live.peak if optimizer.differentiates else max(at_losses)
    return Kept(sum(t.numel() * t.element_size() for t in tensors), live.now, peak)


def _one_more(make: Make, shape: tuple[int, ...], dtype: torch.dtype, linear: bool) -> Kept:
    """What a parameter adds; within a step the first few differ."""
    few, more = (_held(make, shape, count, dtype, linear) for count in (3, 4))
    return Kept(*(b - a for a, b in zip(few, more, strict=True)))


def kept(make: Make, model_shapes: Shapes, dtype: torch.dtype, linear: Shapes) -> Kept:
    """The bytes that an optimizer holds beside weights of these shapes.

    Args:
        make: the optimizer of a module; of another rank, if given as ``rank=``.
        linear: those of the shapes that linear layers alone hold.
    """
    kinds = [(shape, True, count) for shape, count in linear.items()]
    kinds += [(shape, False, count) for shape, count in (model_shapes - linear).items()]
    _held(make, (2, 2), 1, dtype, linear=True)  # keys of streams, which later trials find
    rank = make(_Small((2, 2), 1, dtype, linear=True)).defaults.get("rank", 1)
    ranks = {rank: make} if rank <= 8 else {few: partial(make, rank=few) for few in SMALL}
    least = 16  # sides as long as the rank are another case to some methods
    gc.freeze()  # what was there before is not looked through for what the trials leave
    together, Factors.together = Factors.together, (0, 0)  # as matrices of a real size
    try:
        adds: dict[tuple[int, bool], list[list[list[Kept]]]] = {}
        totals = [0, 0, 0]
        for shape, alone, count in kinds:
            dims = _dims(shape)
            rows = shape[0] if shape else 1
            columns = torch.Size(shape[1:]).numel() if len(shape) > 1 else 2 * least
            if dims > 1 and min(rows, columns) < rank:  # its rank is another
                own = _one_more(make, shape, dtype, alone)
                totals = [total + count * size for total, size in zip(totals, own, strict=True)]
                continue
            if (dims, alone) not in adds:
                adds[dims, alone] = [
                    _adds(of_rank, dims, alone, dtype, least) for of_rank in ranks.values()
                ]
            for index in range(3):
                found = []
                for tried in adds[dims, alone]:
                    corners = [[kept[index] for kept in row] for row in tried]
                    found.append(_bilinear(corners, rows, columns, least))
                totals[index] += count * (found[0] if len(found) == 1 else _quadratic(found, rank))
    finally:
        Factors.together = together
        gc.unfreeze()
    state, beside, peak = totals
    return Kept(state, beside, max(beside, peak))


def _dims(shape: tuple[int, ...]) -> int:
    """Vectors, matrices and what is seen as a matrix are different to optimizers."""
    return min(max(len(shape), 1), 3)


def _adds(make: Make, dims: int, linear: bool, dtype: torch.dtype, least: int) -> list[list[Kept]]:
    """What parameters add with so many rows and twice as many columns, or twice as many of these or
    those."""
    made = []
    for rows in (least, 2 * least):
        if dims == 1:
            one = _one_more(make, (rows,), dtype, linear)
            made.append([one, one])
            continue
        deep = (2,) if dims == 3 else ()
        made.append(
            [
                _one_more(make, (rows, columns // (2 if deep else 1), *deep), dtype, linear)
                for columns in (2 * least, 4 * least)
            ]
        )
    return made


def _bilinear(corners: list[list[int]], rows: int, columns: int, least: int) -> int:
    """a + b x + c y + d x y through the four points of `_adds`, in whole numbers."""
    (first, across), (below, both) = corners
    m, n = least, 2 * least
    down, right = rows - m, columns - n
    scaled = first * m * n + (below - first) * down * n + (across - first) * m * right
    return (scaled + (both - below - across + first) * down * right) // (m * n)


def _quadratic(found: list[int], rank: int) -> int:
    """At `rank`, the parabola through what was found at the ranks of `SMALL`, in whole numbers."""
    first, second, third = found
    x = rank - SMALL[0]
    return first + x * (second - first) + x * (x - 1) // 2 * (third - 2 * second + first)
