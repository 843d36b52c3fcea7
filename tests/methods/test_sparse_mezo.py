"""Sparse MeZO follows its textbook, and moves nothing but the weights of its mask."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import blocks, loss_of, network, same, snapshot
from support.textbook import EPS, SEED, STEPS, dense, loss_of_copy, model_and_tokens
from torch import Tensor, nn

import zo_fused
from zo_fused.directions import shaped
from zo_fused.directions.shaped import magnitude_mask, pack, threshold
from zo_fused.noise import Purpose, derive_key, parameter_id
from zo_fused.noise.reference import random_bits
from zo_fused.noise.streams import as_int64
from zo_fused.sweeps import reference


def quantile_mask(w: Tensor, share: float) -> Tensor:
    """By sorting."""
    ordered = w.abs().flatten().sort().values
    return w.abs() <= ordered[max(math.ceil(share * w.numel()), 1) - 1]


def drawn_mask(name: str, w: Tensor, window: int, share: float) -> Tensor:
    key = as_int64(derive_key(SEED, Purpose.MASK, window))
    words = random_bits(w.numel(), key, as_int64(parameter_id(name)), 0, torch.device("cpu"))
    return ((words & 0xFFFFFFFF) < share * 2**32).view(w.shape)


@pytest.mark.parametrize("kind", ["magnitude", "random"])
def test_fifty_float32_steps_follow_the_float64_textbook(kind: str) -> None:
    """Tolerances as in `test_textbook.py`: the same sweeps over a share of the weights. Both sides
    choose masks by float32 magnitudes (the textbook those of the run), lest two weights whose
    magnitudes differ by less than a rounding change places."""
    model, tokens = model_and_tokens()
    share, interval, lr, decay = 0.3, 20, 1e-3, 0.5

    loss = loss_of_copy(model, tokens)
    opt = zo_fused.SparseMeZO(
        *(model, lr, share, kind, interval), eps=EPS, weight_decay=decay, seed=SEED
    )
    theta = {k: p.detach().double() for k, p in model.named_parameters()}
    start = {k: w.clone() for k, w in theta.items()}
    grads: list[float] = []
    wanted: list[float] = []
    for t in range(STEPS):
        if t % interval == 0:
            masks = {
                k: quantile_mask(p.detach(), share)
                if kind == "magnitude"
                else drawn_mask(k, p, t // interval, share)
                for k, p in model.named_parameters()
            }
        opt.step(lambda: loss(dict(model.named_parameters())))
        grads.append(float(opt.projected_grad))
        z = {k: dense(k, w, t) * masks[k] for k, w in theta.items()}
        plus = loss({k: w + EPS * z[k] for k, w in theta.items()})
        minus = loss({k: w - EPS * z[k] for k, w in theta.items()})
        g = float(plus - minus) / (2 * EPS)
        wanted.append(g)
        theta = {k: w - lr * (g * z[k] + decay * masks[k] * w) for k, w in theta.items()}
    torch.testing.assert_close(torch.tensor(grads), torch.tensor(wanted), rtol=0, atol=2e-4)
    moved = math.sqrt(sum(float((theta[k] - w).square().sum()) for k, w in start.items()))
    off = math.sqrt(
        sum(float((p.detach() - theta[k]).square().sum()) for k, p in model.named_parameters())
    )
    assert moved > 0.05
    assert off < 1e-6 * math.sqrt(sum(w.numel() for w in start.values()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_outside_the_mask_keep_their_bits(dtype: torch.dtype) -> None:
    """Also with decay and stochastic rounding; the others move."""
    model = network(dtype)
    start = snapshot(model)
    masks = [quantile_mask(w, 0.25) for w in start]
    rounding = "nearest" if dtype == torch.float32 else "stochastic"
    opt = zo_fused.SparseMeZO(
        model, lr=1e-2, interval=100, weight_decay=0.1, rounding=rounding, queries=2
    )
    for _ in range(7):
        opt.step(loss_of(model))
    for w, before, mask in zip(snapshot(model), start, masks, strict=True):
        assert torch.equal(w[~mask], before[~mask])
        assert (w[mask] != before[mask]).float().mean() > 0.5


def test_all_weights_are_mezo_to_the_bit() -> None:
    one, two = network(), network()
    options: dict[str, Any] = {"lr": 1e-2, "seed": 3, "weight_decay": 0.1, "queries": 2}
    sparse = zo_fused.SparseMeZO(one, share=1.0, **options)
    dense_ = zo_fused.MeZO(two, **options)
    for _ in range(5):
        sparse.step(loss_of(one))
        dense_.step(loss_of(two))
    assert same(one, two)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("share", [1e-9, 0.2, 0.25, 0.999, 1.0])
def test_the_threshold_is_that_of_sorting(
    dtype: torch.dtype, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly, over several chunks, with ties and zeros; bits are packed in order."""
    monkeypatch.setattr(shaped, "CHUNK", 1 << 9)
    w = torch.randn(1777, generator=torch.Generator().manual_seed(1)).to(dtype)
    w[::7], w[::11] = 0.25, -0.0
    rank = max(math.ceil(share * w.numel()), 1)
    wanted = w.abs().float().sort().values[rank - 1]
    assert torch.tensor(threshold(w, rank), dtype=torch.int32).view(torch.float32) == wanted
    mask = torch.zeros(-(-w.numel() // 8), dtype=torch.uint8)
    pack(magnitude_mask(w, share), mask)
    assert torch.equal(reference.unpacked(mask, 0, 0, w.numel()), quantile_mask(w, share))


@pytest.mark.parametrize("kind", ["magnitude", "random"])
def test_a_new_window_has_a_new_mask(kind: str) -> None:
    """Made from theta, however the weights were looked at, and not before."""
    model = network()
    opt = zo_fused.SparseMeZO(model, lr=0.3, mask=kind, interval=3, seed=1)
    p = next(model.parameters())
    seen = []
    for step in range(7):
        theta = p.detach().clone()
        opt.step(loss_of(model))
        seen.append(opt.state[p]["mask"].clone())
        assert int(opt.state[p]["mask_window"]) == step // 3
        if kind == "magnitude" and step % 3 == 0:
            bits = reference.unpacked(seen[-1], 0, 0, p.numel()).view(p.shape)
            assert torch.equal(bits, quantile_mask(theta, 0.25))
    windows = [seen[0], seen[3], seen[6]]
    assert all(torch.equal(mask, windows[i // 3]) for i, mask in enumerate(seen))
    assert not torch.equal(windows[0], windows[1])


def test_blocks_get_their_masks_in_their_turns() -> None:
    model = network()
    opt = zo_fused.SparseMeZO(blocks(model), lr=1e-2, block_order="sequential")
    before = snapshot(model)
    opt.step(loss_of(model))
    assert len(opt.state) == 2
    after = snapshot(model)
    assert same(before[2:], after[2:])
    assert not same(before[:2], after[:2])


def test_a_log_rebuilds_masks_over_windows(tmp_path: Path) -> None:
    """Nothing of them is in the log: a replay has theta when it gets to a window."""
    model, base = network(torch.bfloat16), network(torch.bfloat16)
    opt = zo_fused.SparseMeZO(model, lr=1e-2, interval=2, rounding="stochastic", seed=5)
    opt.start_log(tmp_path / "log")
    for _ in range(7):
        opt.step(loss_of(model))
    opt.close_log()
    assert zo_fused.replay(base, tmp_path / "log") == 7
    assert same(model, base)


def test_what_does_not_work_is_refused() -> None:
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(TypeError, match="deferred"):
        zo_fused.SparseMeZO([p], deferred=True)  # type: ignore[call-arg]
    for share in (0.0, 1.5, math.nan):
        with pytest.raises(ValueError, match="share must be a number in"):
            zo_fused.SparseMeZO([p], share=share)
    with pytest.raises(ValueError, match="mask"):
        zo_fused.SparseMeZO([p], mask="largest")
