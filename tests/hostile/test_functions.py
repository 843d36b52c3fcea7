"""Whatever the functions are given: an error with every tensor as it was, or what the reference
makes of what was meant."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import hostile
from support.equality import assert_same_bits, bits
from support.hostile import KEYS, NO_KEYS, NO_NUMBERS, NUMBERS, REFUSED, Made, mostly
from torch import Tensor

import zo_fused
from zo_fused.noise.streams import as_int64
from zo_fused.sweeps import reference

# What refuses: checks of the package; torch's dispatcher, for views and layouts that it knows.
ERRORS = (TypeError, ValueError, NotImplementedError, RuntimeError)
number, key = mostly(NUMBERS, NO_NUMBERS), mostly(KEYS, NO_KEYS)
small = mostly([(x, float(x)) for x in (0.0, 0.5, 0.875)], NO_NUMBERS)
pytestmark = pytest.mark.filterwarnings("ignore:Sparse|.*sparse csr:UserWarning")


def looks(x: Tensor) -> Any:
    """Its bits, or what there is of it."""
    with torch.no_grad():
        if x.layout != torch.strided:
            x = x.to_dense()
        if x.device.type == "meta" or x.untyped_storage().nbytes() == 0 or x._is_zerotensor():
            return x.shape
        dense = x.resolve_neg()
        return bits(torch.view_as_real(dense) if x.is_complex() else dense).clone()


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


@dataclass
class Case:
    """A call: what it is given, what that means, and what the reference makes of it."""

    params: list[Made]
    call: Callable[[list[Tensor]], None]
    wanted: Callable[[list[Tensor]], None]  # of contiguous copies
    meanings: list[Any]
    beside: list[Tensor] = field(default_factory=list)  # what is written, too

    def check(self) -> None:
        params = [made.tensor for made in self.params]
        tensors = params + self.beside
        before = [looks(x) for x in tensors]
        fits = all(made.fits for made in self.params) and REFUSED not in self.meanings
        contiguous = torch.contiguous_format
        copies = [x.detach().clone(memory_format=contiguous) for x in tensors] if fits else []
        refused = None
        try:
            self.call(params)
        except ERRORS as error:
            refused = error
        assert (refused is None) == fits, (refused, [made.kind for made in self.params])
        if refused is not None:
            # torch's own are for kinds of tensors
            by_torch = isinstance(refused, RuntimeError)
            assert not by_torch or not all(made.fits for made in self.params), refused
            assert all(map(same, map(looks, tensors), before))
            return
        self.wanted(copies)
        for x, copy in zip(tensors, copies, strict=True):
            assert_same_bits(x.detach().contiguous(), copy, any_nan=True)


# ---- calls --------------------------------------------------------------------------------------


def int64(*values: int) -> Tensor:
    return torch.tensor([as_int64(value) for value in values], dtype=torch.int64)


def rows(params: list[Tensor], *values: float) -> Tensor:
    return torch.tensor([values] * len(params), dtype=torch.float32)


@st.composite
def common(draw: Any) -> tuple[list[Made], dict[str, Any], list[Any], tuple[Any, ...]]:
    """Parameters; ids and a rounding key as they are given; what they mean; for the reference."""
    params = draw(st.lists(hostile.tensors(), min_size=1, max_size=3))
    ids, keys = zip(*(draw(key) for _ in params), strict=True)
    rounding, meant = draw(st.one_of(st.just((None, None)), key))
    meanings = [*keys, meant]
    if len(set(keys)) < len(keys):  # one noise for two parameters
        meanings.append(REFUSED)
    given = {"ids": list(ids), "rounding_key": rounding}
    if REFUSED in meanings:
        return params, given, meanings, ()
    random = None if meant is None else int64(meant)
    return params, given, meanings, (int64(*keys), int64(*[0] * len(keys)), random)


@st.composite
def dense(draw: Any) -> Case:
    params, given, meanings, streams = draw(common())
    keys, coeffs = (draw(st.lists(kind, min_size=2, max_size=2)) for kind in (key, number))
    decay = draw(number)
    meanings += [meant for _, meant in (*keys, *coeffs, decay)]

    def call(tensors: list[Tensor]) -> None:
        row = ([x for x, _ in keys], [x for x, _ in coeffs])
        zo_fused.update_(tensors, *row, decay[0], **given)

    def wanted(copies: list[Tensor]) -> None:
        ids, offsets, random = streams
        table = rows(copies, *(meant for _, meant in coeffs))
        which = int64(*(meant for _, meant in keys))
        by = rows(copies, decay[1])[:, 0]
        reference.dense_(copies, ids, offsets, which, table, by, random)

    return Case(params, call, wanted, meanings)


@st.composite
def placed(draw: Any) -> Case:
    """A perturbation of parts of parameters, as far as there are elements."""
    params, given, meanings, _ = draw(common())
    del given["rounding_key"]
    sizes = [made.tensor.numel() for made in params]
    ends = [(0, 0), (5, 5), (2**34 - 3, 2**34 - 3)]
    bad = [(x, REFUSED) for x in (-1, 2**62, 2**62 + 1, 1.5, None, True, 2**64)]
    offsets = []
    for size in sizes:
        last = 2**62 - max(size, 1)
        behind = [(last + 1, REFUSED), *bad]
        offsets.append(draw(mostly([*ends, (last, last)], behind)))
    which, scale = draw(key), draw(number)
    starts = [meant for _, meant in offsets]
    # with offsets two may be parts of one parameter
    meanings = [*meanings[: len(params)], *starts, which[1], scale[1]]

    def call(tensors: list[Tensor]) -> None:
        given["offsets"] = [x for x, _ in offsets]
        zo_fused.perturb_(tensors, which[0], scale[0], **given)

    def wanted(copies: list[Tensor]) -> None:
        ids = int64(*meanings[: len(params)])
        table, ones = rows(copies, scale[1]), rows(copies, 1.0)[:, 0]
        reference.dense_(copies, ids, int64(*starts), int64(which[1]), table, ones)

    return Case(params, call, wanted, meanings)


@st.composite
def moments(draw: Any) -> Case:
    params, given, meanings, streams = draw(common())
    rule = draw(st.sampled_from(["momentum", "sign", "adam"]))
    names = ("beta", "gain", "beta2", "gain2", "eps", "step", "restores", "decay")
    numbers = {name: draw(small) for name in names}
    which, grad = draw(key), draw(number)
    meanings += [meant for _, meant in (which, grad, *numbers.values())]
    fit = all(made.fits for made in params)
    likes = [torch.zeros_like(made.tensor, dtype=torch.float32) if fit else torch.zeros(2)
             for made in params]  # fmt: skip
    seconds = [like.clone() for like in likes] if rule == "adam" else []

    def call(tensors: list[Tensor]) -> None:
        plain = {name: x for name, (x, _) in numbers.items()}
        zo_fused.moments_update_(
            tensors, [which[0]], [grad[0]], rule, firsts=likes, seconds=seconds, **plain, **given
        )

    def wanted(copies: list[Tensor]) -> None:
        ids, offsets, random = streams
        weights, others = copies[: len(params)], copies[len(params) :]
        lists = weights, others[: len(params)], others[len(params) :]
        *table, restore, decay = (meant for _, meant in numbers.values())
        reference.moments_(
            *lists, ids, offsets, int64(which[1]), rows(weights, grad[1]),
            rows(weights, restore), rows(weights, *table), rows(weights, decay)[:, 0], rule, random,
        )  # fmt: skip

    return Case(params, call, wanted, meanings, [*likes, *seconds])


@st.composite
def low_rank(draw: Any) -> Case:
    params, given, meanings, streams = draw(common())
    u, v, coeff, decay = draw(key), draw(key), draw(number), draw(number)
    bad = [(x, REFUSED) for x in (0, -1, 1.0, True, None, "1", 2.5)]
    rank = draw(mostly([(1, 1), (3, 3), (7, 7)], bad))
    meanings += [meant for _, meant in (u, v, coeff, decay, rank)]

    def call(tensors: list[Tensor]) -> None:
        given["rank"] = rank[0]
        zo_fused.lowrank_update_(tensors, u[0], v[0], coeff[0], decay[0], **given)

    def wanted(copies: list[Tensor]) -> None:
        ids, offsets, random = streams
        factors = []
        for side, (_, stream) in enumerate((u, v)):
            shapes = [(x.shape[0] if x.dim() else 1, math.prod(x.shape[1:])) for x in copies]
            made = [torch.empty(shape[side], rank[1]) for shape in shapes]
            reference.normal_(made, ids, offsets, int64(*[stream] * len(made)))
            factors.append(made)
        table = (rows(copies, x)[:, 0] for x in (coeff[1], decay[1]))
        reference.lowrank_(copies, *factors, *table, ids, offsets, random)

    return Case(params, call, wanted, meanings)


CASES = {
    "update_": dense(),
    "perturb_": placed(),
    "moments_update_": moments(),
    "lowrank_update_": low_rank(),
}


@pytest.mark.parametrize("amount", [40, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_a_call(name: str, amount: int) -> None:
    @settings(max_examples=amount)
    @given(CASES[name])
    def run(case: Case) -> None:
        case.check()

    run()
