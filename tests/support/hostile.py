"""Arguments that nobody should give: strategies of hypothesis for numbers, keys and tensors.

Each value comes with what it means, told here and not by the package, or `REFUSED`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

REFUSED = object()
Meant = tuple[Any, Any]  # a value, and the number that it means


_LARGEST = 3.4028234663852886e38  # of float32

# ---- numbers ------------------------------------------------------------------------------------

NUMBERS: list[Meant] = [
    (0.5, 0.5), (-1.25, -1.25), (0, 0.0), (-0.0, -0.0), (3, 3.0), (1e-3, 1e-3), (5e-324, 0.0),
    (_LARGEST, _LARGEST), (np.float32(0.25), 0.25), (np.float16(0.25), 0.25), (np.int64(-2), -2.0),
    (np.uint8(2), 2.0), (np.array(0.5), 0.5), (Decimal("0.125"), 0.125), (Fraction(1, 3), 1 / 3),
    (torch.tensor(0.5), 0.5), (torch.tensor(0.75, dtype=torch.float64), 0.75),
    (torch.tensor(2), 2.0), (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
    (torch.tensor(0.5, requires_grad=True), 0.5),
]  # fmt: skip
NO_NUMBERS: list[Meant] = [
    (value, REFUSED)
    for value in (
        *(
            math.nan,
            math.inf,
            -math.inf,
            1e39,
            -1e39,
            10**400,
            Decimal("sNaN"),
            Decimal("Infinity"),
        ),
        *(True, np.bool_(True), None, "0.5", b"0.5", 1j, np.complex64(1), {}, {0.5}, object()),
        *(torch.tensor(math.nan), torch.tensor(1e39, dtype=torch.float64), torch.tensor(True)),
        *(torch.tensor(1j), torch.ones(7), torch.ones(3, 3, 3), np.ones(7), [0.5] * 7, ["0.5"]),
        *([math.nan], [None], np.array("0.5"), np.array(math.nan), torch.ones((), device="meta")),
    )
]

# ---- whole numbers of 64 bits -------------------------------------------------------------------

KEYS: list[Meant] = [
    *((n, n) for n in (0, 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 0x0123_4567_89AB_CDEF)),
    (np.uint64(2**64 - 1), 2**64 - 1), (np.int32(7), 7), (torch.tensor(9), 9), (np.array(3), 3),
]  # fmt: skip
NO_KEYS: list[Meant] = [
    (value, REFUSED)
    for value in (
        *(-1, 2**64, 10**400, 1.0, 1.5, math.nan, True, np.bool_(True), None, "1", 1j, [1], ()),
        *(np.float64(1), np.int64(-1), torch.tensor(1.0), torch.tensor(True), torch.tensor(-1)),
        *(torch.ones(2, dtype=torch.int64), Decimal(1), Fraction(1), object()),
    )
]


def mostly(good: list[Meant], bad: list[Meant], odds: int = 8) -> st.SearchStrategy[Meant]:
    """One of the good values, once in `odds` times one of the bad ones."""
    few = st.sampled_from(bad)
    return st.integers(1, odds).flatmap(lambda n: few if n == odds else st.sampled_from(good))


# ---- tensors ------------------------------------------------------------------------------------


@dataclass
class Made:
    """A tensor, and whether a sweep may take it."""

    tensor: Tensor
    fits: bool
    kind: str


def _gaps(x: Tensor) -> Tensor:
    return torch.stack([x, x], dim=-1)[..., 0]


def _odd(x: Tensor) -> Tensor:
    memory = torch.zeros(x.numel() + 3, dtype=x.dtype)
    memory[3:] = x.flatten()
    return memory[3:].view(x.shape)


def _freed(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def _inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


# What makes another tensor of the same numbers; whether a sweep takes it if it has elements to
# spare, that is two in a dimension.
LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "as it is": (lambda x: x, True),
    "reversed": (lambda x: x.permute(tuple(reversed(range(x.dim())))), True),
    "columns first": (lambda x: x.transpose(0, -1).contiguous().transpose(0, -1), True),
    "odd address": (_odd, True),
    "parameter": (lambda x: torch.nn.Parameter(x, requires_grad=x.is_floating_point()), True),
    "no leaf": (lambda x: x.clone().requires_grad_() * 1 if x.is_floating_point() else x, True),
    "inference": (_inference, True),
    "gaps": (_gaps, False),
    "expanded": (lambda x: x[:1].expand(5, *x.shape[1:]), False),
    "windows": (lambda x: x.flatten().unfold(0, 2, 1), False),
    "sparse": (lambda x: x.to_sparse(), False),
    "negated": (torch._neg_view, False),
    "freed": (_freed, False),
    "meta": (lambda x: x.to("meta"), False),
    "zeros without memory": (lambda x: torch._efficientzerotensor(tuple(x.shape)), False),
}
WEIGHTS = (torch.float32, torch.float16, torch.bfloat16)
NO_WEIGHTS = (torch.float64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn)


def numbers(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def tensors(draw: Any, odds: int = 6, dims: int = 4) -> Made:
    """A tensor of any shape up to four dimensions; once in `odds` times none that a sweep takes."""
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=dims)))
    good = draw(st.integers(1, odds)) < odds
    dtype = draw(st.sampled_from(WEIGHTS))
    x = numbers(shape, draw(st.integers(0, 99)))
    if not good and draw(st.booleans()):
        dtype = draw(st.sampled_from(NO_WEIGHTS))
        return Made((x * 9).to(dtype), False, str(dtype))
    fitting = [name for name, (_, fits) in LAYOUTS.items() if fits == good]
    kind = draw(st.sampled_from(fitting))
    if not good:
        x = numbers(tuple(n + 2 for n in shape) or (3,), 0)  # where there's something to be wrong
    if kind == "columns first" and x.dim() < 2:
        kind = "as it is"
    return Made(LAYOUTS[kind][0](x.to(dtype)), good, kind)
