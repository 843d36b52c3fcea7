"""SeeZO: a float64 textbook, the space that it moves in, and rows of the head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import loss_of, network, same, snapshot
from support.textbook import (
    EPS,
    SEED,
    STEPS,
    Loss,
    Weights,
    dense,
    drawn,
    float64_loss,
    follow,
    model_and_tokens,
    moved_by,
)
from torch import Tensor, nn

import zo_fused
from zo_fused.noise import Purpose
from zo_fused.task.optimizers import make_optimizer

RANK, QUERIES, LR = 3, 2, 5e-3
ROWS = {"head.weight": [7, 3, 30, 3]}


def made(model: Any, **kw: Any) -> zo_fused.SeeZO:
    options = {"lr": LR, "rank": RANK, "queries": QUERIES, "rows": ROWS}
    return zo_fused.SeeZO(model, **options, eps=EPS, seed=SEED, **kw)


def bases() -> Weights:
    """A of every matrix that moves: the first step finds it at theta. `test_activations` has what
    it is."""
    model, tokens = model_and_tokens()
    loss = float64_loss(model, tokens)
    opt = made(model)
    opt.step(lambda: loss(dict(model.named_parameters())))
    return {
        name: opt.state[p]["basis"].double()
        for name, p in model.named_parameters()
        if "basis" in opt.state.get(p, {})
    }


def textbook(loss: Loss, theta: Weights) -> list[float]:
    found, grads = bases(), []
    assert len(found) == 9  # eight layers and the head
    rows = torch.zeros(31, 1, dtype=torch.float64)
    rows[[3, 7, 30]] = 1

    def z(step: int, query: int) -> Weights:
        out = {}
        for name, w in theta.items():
            if w.dim() < 2:
                out[name] = dense(name, w, step, query)
                continue
            u = drawn(name, (len(w), RANK), Purpose.U, step, query)
            out[name] = (u * rows if name == "embed.weight" else u) @ found[name].T
        return out

    for step in range(STEPS):
        base = loss(theta)
        zs = [z(step, query) for query in range(QUERIES)]
        gs = [float((loss(moved_by(theta, EPS, one)) - base) / EPS) for one in zs]
        for name, w in theta.items():
            update = sum(g * one[name] for g, one in zip(gs, zs, strict=True)) / QUERIES
            w -= LR * update
        grads += gs
    return grads


@pytest.mark.parametrize(
    "kw", [{}, {"deferred": True}, {"mode": "factored", "rounding": "nearest"}], ids=str
)
def test_fifty_float32_steps_follow_the_float64_textbook(kw: dict[str, Any]) -> None:
    """A step has four sweeps at most, each of which rounds: a weight near 1 is off by
    sqrt(200) 2^-25 or 4e-7 at the end. At random, that moves a loss by the gradient's norm (below
    10) times as much, and g by twice 4e-6 over eps; of 100 numbers the worst is three times as far
    off."""
    run = follow(lambda model: made(model, **kw), textbook)
    torch.testing.assert_close(run.grads, run.expected, rtol=0, atol=2.4e-3)
    assert run.moved > 0.5
    assert run.distance < 1e-3 * run.moved


def test_the_directions_are_orthonormal_coordinates() -> None:
    """The squared length of z is on average the dimension: the rows of layers that are moved times
    the rank, and the vectors. Of its 800 numbers it is off by sqrt(2 / 800) or 5 %."""
    model, tokens = model_and_tokens()
    opt = made(model)
    opt.step(lambda: model(tokens))
    dimension = sum(
        p.numel() if p.dim() < 2 else len(opt.state[p].get("rows", p)) * RANK
        for group in opt.param_groups
        for p in group["params"]
    )
    start = [p.detach().clone() for p in model.parameters()]
    opt.perturb(1.0)
    length = sum(
        float((p.detach() - w).double().square().sum())
        for p, w in zip(model.parameters(), start, strict=True)
    )
    assert length / EPS**2 == pytest.approx(dimension, rel=0.2)


def test_other_rows_and_matrices_stay() -> None:
    model, tokens = model_and_tokens()
    before = model.embed.weight.detach().clone()
    opt = zo_fused.SeeZO(model, lr=LR, rank=2, rows={"embed.weight": [1, 4]})
    for _ in range(3):
        opt.step(lambda: model(tokens))
    moved = (model.embed.weight.detach() != before).any(1).nonzero().flatten()
    assert moved.tolist() == [1, 4]

    model, tokens = model_and_tokens()
    before = model.embed.weight.detach().clone()
    opt = zo_fused.SeeZO(model, lr=LR, rank=2)
    opt.step(lambda: model(tokens))
    assert torch.equal(model.embed.weight, before)


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ({"embed": [1]}, "rows has 'embed', which is no weight of a linear layer"),
        ({"blocks.0.norm1.weight": [1]}, "which is no weight of a linear layer"),
        ({"head.weight": []}, "must be some of 0 to 30, got \\[\\]"),
        ({"head.weight": [2, 31]}, "must be some of 0 to 30, got \\[2, 31\\]"),
        ({"head.weight": [-1]}, "a row of 'head.weight' must be"),
        ({"head.weight": [1.5]}, "a row of 'head.weight' must be"),
    ],
    ids=str,
)
def test_rows_that_there_are_not_are_refused(rows: dict[str, list[int]], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        zo_fused.SeeZO(model_and_tokens()[0], rows=rows)


def test_a_module_is_needed() -> None:
    with pytest.raises(ValueError, match="SeeZO looks at the layers of a module"):
        zo_fused.SeeZO(network().parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kw", [{}, {"refresh": 2}, {"mode": "factored"}], ids=str)
def test_resumed_and_replayed_bit_for_bit_with_rows(
    kw: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    def fresh() -> tuple[nn.Module, Tensor]:
        model, tokens = model_and_tokens()
        return model.to(dtype), tokens

    log = tmp_path / "log.jsonl"
    model, tokens = fresh()
    opt = made(model, **kw)
    opt.start_log(log)
    for _ in range(3):
        opt.step(lambda: model(tokens))
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    state = opt.state_dict()
    again, _ = fresh()
    again.load_state_dict(weights)
    resumed = made(again, **kw)
    resumed.load_state_dict(state)
    for _ in range(2):
        opt.step(lambda: model(tokens))
        resumed.step(lambda: again(tokens))
    opt.flush()
    resumed.flush()
    opt.close_log()
    base, _ = fresh()
    zo_fused.replay(base, log)
    assert same(snapshot(again), snapshot(model))
    assert same(snapshot(base), snapshot(model))


def test_forward_passes_are_counted() -> None:
    model = network()
    opt = zo_fused.SeeZO(model, rank=2, queries=3, refresh=2)
    calls, loss = 0, loss_of(model)

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        return loss()

    for step in range(5):
        opt.step(closure)
        assert calls == opt.forwards_of(step + 1) == 2 + 4 * (step + 1)


def test_the_command_line_names_the_rows_of_the_answers() -> None:
    pytest.importorskip("transformers")
    from support.tiny_models import causal_model

    model = causal_model("opt")
    hyper = {"lr": 1e-3, "rank": 2, "schedule": "plain"}
    opt = make_optimizer("seezo", hyper, model, tokens=[[5, 9], [5, 3]])
    head = model.get_output_embeddings().weight
    assert opt.state[head]["rows"].tolist() == [3, 5, 9]
    head.requires_grad_(False)
    assert not make_optimizer("seezo", hyper, model, tokens=[[5], [3]]).state


def test_a_state_of_other_rows_is_refused() -> None:
    model, tokens = model_and_tokens()
    opt = made(model)
    opt.step(lambda: model(tokens))
    for kw in ({"rows": {"head.weight": [2]}}, {"others": "random"}):
        other = zo_fused.SeeZO(model_and_tokens()[0], rank=RANK, queries=QUERIES, **kw)
        with pytest.raises(ValueError, match="with the rows of that run"):
            other.load_state_dict(opt.state_dict())
    other = zo_fused.SeeZO(model_and_tokens()[0], rank=RANK, queries=QUERIES)
    with pytest.raises(ValueError, match=r"other parameters: 'embed.weight'"):  # it is frozen there
        other.load_state_dict(opt.state_dict())


def test_a_decay_would_move_the_other_rows() -> None:
    with pytest.raises(ValueError, match=r"weight_decay would move all 31 rows of 'embed.weight'"):
        zo_fused.SeeZO(model_and_tokens()[0], rows=ROWS, weight_decay=0.1)
    model, tokens = model_and_tokens()
    opt = made(model)
    opt.param_groups[0]["weight_decay"] = 0.1
    with pytest.raises(ValueError, match=r"weight_decay would move all 31 rows of 'embed.weight'"):
        opt.step(lambda: model(tokens))


@pytest.mark.parametrize("kind", [zo_fused.SeeZO, zo_fused.LOZO])
def test_others_that_are_added_are_frozen_too(kind: Any) -> None:
    """SeeZO's are matrices, LOZO's all but the matrices of layers."""
    model, tokens = model_and_tokens()
    first, second = (list(block.named_parameters()) for block in model.blocks)
    kw: dict[str, Any] = {} if kind is zo_fused.SeeZO else {"basis": "activations"}
    opt = kind(first, lr=LR, rank=2, others="frozen", module=model, **kw)
    more = [(f"second.{name}", p) for name, p in second]
    opt.add_param_group({"params": [("embed.weight", model.embed.weight), *more]})
    tuned = opt.param_groups[1]["param_names"]
    assert tuned == [name for name, p in more if kind is zo_fused.SeeZO or p.dim() == 2]
    before = model.embed.weight.detach().clone()
    opt.step(lambda: model(tokens))
    assert torch.equal(model.embed.weight, before)
    with pytest.raises(ValueError, match="leaves nothing to tune"):
        opt.add_param_group({"params": [("more.weight", nn.Embedding(5, 16).weight)]})
    assert len(opt.param_groups) == 2
    model.blocks[0].up.weight.requires_grad_(False)
    named = [("embed.weight", model.embed.weight), ("up.weight", model.blocks[0].up.weight)]
    opt = kind(named, rank=2, others="frozen", module=model, **kw)
    with pytest.raises(ValueError, match=r'leaves nothing to tune: .*others="random" tunes others'):
        opt.step(lambda: model(tokens))


def test_a_state_in_another_order_has_the_same_rows() -> None:
    model, tokens = model_and_tokens()
    opt = made(model)
    opt.step(lambda: model(tokens))
    other, _ = model_and_tokens()
    turned = made(list(other.named_parameters())[::-1], module=other)
    turned.load_state_dict(opt.state_dict())
    assert turned.state[other.embed.weight]["rows"].tolist() == [3, 7, 30]
