"""The rivals make the published steps: the same formula, normals, and the weights restored."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.published import EPS, GRAD, LR, METHODS, MeZO
from bench.rivals import RIVALS, Foreach

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = ((400, 96), (96,), (128, 200), (1000,))


def tl_randn(published: MeZO) -> MeZO:
    from bench.gpu.tl_randn import TlRandn

    return TlRandn(published)


compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="inductor needs a C++ compiler"
)
triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
CASES = [
    *(pytest.param("MeZO" if dense else "LOZO", make, id=f"{name}-{'MeZO' if dense else 'LOZO'}",
                   marks=[compiler, pytest.mark.slow] if name == "compiled" else [])
      for dense in (True, False)
      for name, make in {"published": lambda published: published, **RIVALS}.items()),
    pytest.param("MeZO", tl_randn, id="tl.randn", marks=[triton, pytest.mark.slow]),
]  # fmt: skip
every_rival = pytest.mark.parametrize(("method", "make"), CASES)
Make = Callable[[MeZO], MeZO]


def weights(dtype: torch.dtype, scale: float) -> list[nn.Parameter]:
    torch.manual_seed(7)
    return [nn.Parameter((scale * torch.randn(shape)).to(dtype)) for shape in SHAPES]


def values(params: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach().double().clone() for p in params]


def noise_of(rival: MeZO) -> list[Tensor]:
    """The z of the sweeps, by which weights of zero move."""
    rival.perturb(1)
    return [x / EPS for x in values(rival.params)]


@every_rival
@torch.no_grad()
def test_directions_are_gaussian_or_a_product_of_gaussians(method: str, make: Make) -> None:
    rival = make(METHODS[method](weights(torch.float32, 0)))
    factors = []
    for p, z in zip(rival.params, noise_of(rival), strict=True):
        v = rival.v.get(id(p))
        if v is None:
            factors.append(z.flatten())
            continue
        u = torch.linalg.lstsq(v.double(), z.t()).solution.t()
        assert torch.allclose(u @ v.double().t(), z, atol=1e-5)
        factors.append(u.flatten())
    x = torch.cat(factors)
    error = len(x) ** -0.5
    assert abs(x.mean()) < 4 * error
    assert abs(x.square().mean() - 1) < 4 * 2**0.5 * error
    assert abs(x.pow(4).mean() - 3) < 4 * 96**0.5 * error
    assert abs((x[1:] * x[:-1]).mean()) < 4 * error


@every_rival
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_three_perturbations_restore_the_weights(
    method: str, make: Make, dtype: torch.dtype
) -> None:
    rival = make(METHODS[method](weights(dtype, 0.02)))
    before = values(rival.params)
    rival.perturb(1)
    moved = values(rival.params)
    rival.perturb(-2)
    rival.perturb(1)
    # Three roundings of the sum, and where z has the weights' dtype, of its products.
    ulp = torch.finfo(dtype).eps
    for was, away, now in zip(before, moved, values(rival.params), strict=True):
        assert (away - was).std() > 0.5 * EPS
        bound = 3 * ulp * (was.abs() + 4 * (away - was).abs()) + 2e-7
        assert bool(((now - was).abs() <= bound).all())


@every_rival
@torch.no_grad()
def test_the_update_is_along_the_same_direction(method: str, make: Make) -> None:
    rival = make(METHODS[method](weights(torch.float32, 0)))
    z = noise_of(rival)
    for p in rival.params:
        p.zero_()
    rival.update()
    for moved, direction in zip(values(rival.params), z, strict=True):
        assert torch.allclose(moved, -LR * GRAD * direction, rtol=1e-5, atol=1e-12)


@every_rival
@torch.no_grad()
def test_a_step_ends_where_the_update_alone_would(method: str, make: Make) -> None:
    rival = make(METHODS[method](weights(torch.float32, 0)))
    z = noise_of(rival)
    for p in rival.params:
        p.zero_()
    rival.step_without_forward()
    for moved, direction in zip(values(rival.params), z, strict=True):
        assert torch.allclose(moved, -LR * GRAD * direction, atol=2e-9)  # three roundings at eps z


@every_rival
@torch.no_grad()
def test_seeds_choose_directions(method: str, make: Make) -> None:
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(3)
        rival = make(METHODS[method](weights(torch.float32, 0)))
        rival.perturb(1, seed)
        found.append(torch.cat([p.flatten() for p in rival.params]))
    assert torch.equal(found[0], found[1])
    assert (found[0] != found[2]).float().mean() > 0.99


@compiler
@pytest.mark.slow
@torch.no_grad()
def test_nothing_is_compiled_in_a_timed_call() -> None:
    graphs: Any = torch._dynamo.utils.counters["stats"]
    for method in METHODS:
        for dtype in DTYPES:
            rival = RIVALS["compiled"](METHODS[method](weights(dtype, 0.02)))
            before = graphs["unique_graphs"]
            rival.step_without_forward()
            assert graphs["unique_graphs"] == before
    assert before > 0


def test_groups_of_foreach_hold_every_parameter_and_no_more_than_the_buffer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Foreach, "BUFFER", 30000)
    rival = Foreach(METHODS["MeZO"](weights(torch.float32, 0)))
    assert [p for group in rival.groups for p, _ in group] == rival.params
    sizes = [[shape.numel() for _, shape in group] for group in rival.groups]
    assert sizes == [[38400], [96, 25600, 1000]]
