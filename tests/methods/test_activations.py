"""V from activations (AGZO, ZO-Act): the bases against NumPy's SVD, and a float64 textbook."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.logs import records_of, write_records
from support.models import loss_of, network, same, snapshot
from support.textbook import EPS, SEED, STEPS, SmallTransformer, dense, drawn, model_and_tokens
from torch import Tensor, nn
from torch.func import functional_call

import zo_fused
from zo_fused.cli.method_options import by_method
from zo_fused.directions.activations import FIRST_PASSES
from zo_fused.directions.inputs import Inputs, linear_layers
from zo_fused.noise import Purpose
from zo_fused.task.optimizers import make_optimizer

Weights = dict[str, Tensor]


def inputs_of(model: nn.Module, run: Callable[[], Any]) -> dict[str, Tensor]:
    """What every linear layer is given, stacked, float64, by the name of its weight."""
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(f"{name}.weight", []).append(
                args[0].detach().flatten(0, -2).double()
            )
        )
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def top_of(x: Tensor, rank: int) -> Tensor:
    return torch.from_numpy(np.linalg.svd(x.numpy(), full_matrices=False)[2][:rank].T.copy())


# ---- the space -----------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 4])
def test_the_top_singular_vectors_of_the_inputs(parts: int) -> None:
    """Singular values 1, 1/2, 1/4, ..: each of three iterations shrinks what is beyond the 11
    columns by 4^-9 or more, relative to the third."""
    torch.manual_seed(0)
    left, right = torch.linalg.qr(torch.randn(60, 20))[0], torch.linalg.qr(torch.randn(20, 20))[0]
    x = left @ torch.diag(0.5 ** torch.arange(20.0)) @ right.T
    layer = nn.Linear(20, 5)
    inputs = Inputs({1: [layer]}, {1: torch.randn(20, 11)})
    for again in range(3):
        assert not again or inputs.iterate()
        with torch.no_grad(), inputs.watched():
            for part in x.view(parts, 60 // parts, 20):  # micro-batches
                layer(part)
    found = inputs.top(3)
    assert found is not None
    a, expected = found[1].double(), right[:, :3].double()
    torch.testing.assert_close(a.T @ a, torch.eye(3).double(), rtol=0, atol=1e-6)
    # X^T (X Q) is rounded to 2^-24 of its largest number, and the third value of X^T X is 2^-4
    cosines = (a * expected).sum(0).abs()
    torch.testing.assert_close(cosines, torch.ones(3).double(), rtol=0, atol=1e-4)
    assert not layer._forward_pre_hooks


def test_more_columns_than_a_layer_has_are_zero() -> None:
    layer = nn.Linear(2, 5)
    inputs = Inputs({1: [layer]}, {1: torch.randn(2, 2)})
    with torch.no_grad(), inputs.watched():
        layer(torch.randn(7, 2))
    found = inputs.top(4)
    assert found is not None
    assert found[1].shape == (2, 4)
    assert not found[1][:, 2:].any()
    gram = found[1][:, :2].T @ found[1][:, :2]
    torch.testing.assert_close(gram, torch.eye(2), rtol=0, atol=1e-6)


def test_which_weights_have_inputs() -> None:
    model, _ = model_and_tokens()
    layers = linear_layers(model)
    names = {name for name, p in model.named_parameters() if id(p) in layers}
    every = {f"blocks.{i}.{n}.weight" for i in (0, 1) for n in ("qkv", "out", "up", "down")}
    assert names == every  # not the head, which is tied to the embedding


@pytest.mark.parametrize("kw", [{}, {"mode": "factored"}, {"others": "frozen"}], ids=str)
def test_v_is_the_space_of_the_first_inputs(kw: dict[str, Any], caplog: Any) -> None:
    model, tokens = model_and_tokens()
    expected = inputs_of(model, lambda: model(tokens))
    opt = zo_fused.LOZO(model, lr=0.0, rank=1, basis="activations", seed=SEED, **kw)
    with caplog.at_level(logging.INFO, "zo_fused"):
        for _ in range(2):
            opt.step(lambda: model(tokens))
    told = [r.message for r in caplog.records if "random V" in r.message]
    frozen = kw.get("others") == "frozen"
    assert len(told) == (not frozen), told
    assert frozen or "embed.weight" in told[0]
    held = 0
    for name, p in model.named_parameters():
        if name not in expected or "basis" not in opt.state.get(p, {}):
            continue
        held += 1
        v = opt.state[p]["basis"].double()
        torch.testing.assert_close(v.T @ v, torch.full((1, 1), float(len(v))).double())
        top = top_of(expected[name], 1)
        spectrum = np.linalg.svd(expected[name].numpy(), compute_uv=False)
        # after three steps from a random start; the next singular value's share of it is left
        left = (spectrum[1] / spectrum[0]) ** (2 * FIRST_PASSES) * 5
        assert 1 - float((top.T @ v).abs()) / len(v) ** 0.5 <= max(left, 1e-6)
    assert held == 8


def test_rows_of_an_update_lie_in_the_span() -> None:
    model, tokens = model_and_tokens()
    opt = zo_fused.LOZO(model, lr=1e-2, rank=2, basis="activations", others="frozen")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    opt.step(lambda: model(tokens))
    for name, p in model.named_parameters():
        moved = (p.detach() - start[name]).double()
        if "basis" not in opt.state.get(p, {}):
            assert not moved.any()
            continue
        a = opt.state[p]["basis"].double() / len(opt.state[p]["basis"]) ** 0.5
        assert moved.any()
        # three sweeps, each rounding weights below 2 to half of 2^-23
        assert float((moved - moved @ a @ a.T).abs().max()) < 16 * 3 * 2.0**-24


# ---- the textbook --------------------------------------------------------------------------------


def float64_loss(model: nn.Module, tokens: Tensor, weights: Weights) -> float:
    with torch.no_grad():
        return float(functional_call(model, weights, (tokens,)))


@pytest.mark.parametrize(
    "kw",
    [
        {},
        {"mode": "factored"},
        {"momentum": 0.9},
        {"moments": "adam"},
        {"one_sided": True, "others": "frozen"},
    ],
    ids=str,
)
def test_the_textbook(kw: dict[str, Any]) -> None:
    """float64, whole tensors at a time, with V from a V of its own making: the top singular vector
    by NumPy, of the float64 model's inputs. With rank 1 only the sign of V is free, and U V^T has
    another distribution of its own for neither sign, so the sign is taken from the run."""
    model, tokens = model_and_tokens()
    reference = copy.deepcopy(model).double()
    lr = 1e-4 if kw.get("moments") else 1e-3
    opt = zo_fused.LOZO(
        model,
        lr=lr,
        eps=EPS,
        rank=1,
        interval=10 if not kw.get("moments") else 100,
        basis="activations",
        seed=SEED,
        **{"rounding": "nearest", **kw},
    )
    theta = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    start = {name: w.clone() for name, w in theta.items()}
    with torch.no_grad():
        opt.step(lambda: model(tokens))  # which finds V
        for name, p in model.named_parameters():
            p.copy_(start[name])
    vs: Weights = {}
    for name, p in model.named_parameters():
        if "basis" in opt.state.get(p, {}):
            x = inputs_of(reference, lambda: reference(tokens))[name]
            top = top_of(x, 1)
            v = opt.state[p]["basis"].double()
            spectrum = np.linalg.svd(x.numpy(), compute_uv=False)
            if spectrum[1] > 0.5 * spectrum[0]:
                vs[name] = v  # the iteration has not separated them: the run's own
            else:
                vs[name] = top * (top.T @ v).sign() * len(v) ** 0.5
    assert len(vs) == 8
    # the run from the beginning, with the V of that step in its state
    state = opt.state_dict()
    keep = {
        key: {n: t for n, t in s.items() if n.startswith("basis")}
        for key, s in state["state"].items()
    }
    opt.load_state_dict(
        {
            "state": {key: s for key, s in keep.items() if s},
            "param_groups": [{**g, "step": 0, "restores": 0} for g in state["param_groups"]],
        }
    )
    moving = [n for n in theta if not (kw.get("others") == "frozen" and n not in vs)]
    momentum: Weights = {}
    second: Weights = {}
    for t in range(STEPS):
        opt.step(lambda: model(tokens))
        us, v_of = {}, {}
        for name in moving:
            w = theta[name]
            if w.dim() < 2:
                us[name], v_of[name] = dense(name, w, t)[:, None], torch.ones(1, 1).double()
                continue
            m, n = w.shape
            us[name] = drawn(name, (m, 1), Purpose.U, t)
            window = t // 10 if not kw.get("moments") else 0
            random_v = drawn(name, (n, 1), Purpose.V, window)
            v_of[name] = vs.get(name, random_v)
            if kw.get("momentum") and t and t % 10 == 0 and name not in vs:
                old = drawn(name, (1, n), Purpose.V, t // 10 - 1)
                product = old @ random_v / n
                momentum[name] = momentum[name] @ product
        z = {name: (us[name] @ v_of[name].T).view(theta[name].shape) for name in moving}
        away = 0.0 if kw.get("one_sided") else -1.0
        plus = {k: w + EPS * z[k] if k in z else w for k, w in theta.items()}
        minus = {k: w + away * EPS * z[k] if k in z else w for k, w in theta.items()}
        apart = EPS * (1 - away)
        losses = [float64_loss(reference, tokens, w) for w in (plus, minus)]
        g = (losses[0] - losses[1]) / apart
        for name in moving:
            step = g * us[name]
            if beta := kw.get("momentum"):
                momentum[name] = beta * momentum.get(name, 0.0) + (1 - beta) * step
                step = momentum[name]
            if kw.get("moments"):
                momentum[name] = 0.9 * momentum.get(name, 0.0) + 0.1 * step
                second[name] = 0.999 * second.get(name, 0.0) + 0.001 * step * step
                first = momentum[name] / (1 - 0.9 ** (t + 1))
                step = first / ((second[name] / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
            theta[name] = theta[name] - lr * (step @ v_of[name].T).view(theta[name].shape)
    opt.flush()
    apart_now = max(
        float((p.detach().double() - theta[n]).abs().max()) for n, p in model.named_parameters()
    )
    moved = max(float((theta[n] - start[n]).abs().max()) for n in theta)
    # losses near 16 are rounded to 2^-21, so g to 2^-21 / EPS = 5e-5 of about 1: over 50 steps that
    # drift apart, a thousandth of the way
    assert moved > 1e-3
    assert apart_now < 5e-3 * moved


# ---- steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kw", "passes"),
    [
        ({}, 3 + 8 * 2),
        ({"refresh": 4}, 3 + 8 * 2 + 1),
        ({"refresh": 4, "one_sided": True}, 2 + 8 * 2),
        ({"refresh": 4, "deferred": True}, 3 + 8 * 2 + 1),
        ({"refresh": 4, "mode": "factored", "one_sided": True}, 2 + 8 * 2),
    ],
    ids=str,
)
def test_forward_passes(kw: dict[str, Any], passes: int) -> None:
    model, calls = network(), []
    opt = zo_fused.LOZO(model, basis="activations", **kw)
    loss = loss_of(model)
    for _ in range(8):
        opt.step(lambda: (calls.append(0), loss())[1])
    assert len(calls) == passes == opt.forwards_of(8)
    assert opt.forwards == 2


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("kw", [{"deferred": True}, {"mode": "factored"}], ids=str)
def test_schedules_agree(kw: dict[str, Any], momentum: float) -> None:
    """Over three windows with a V of their own."""
    models = [model_and_tokens()[0] for _ in range(2)]
    tokens = model_and_tokens()[1]
    for model, more in zip(models, ({}, kw), strict=True):
        opt = zo_fused.LOZO(
            model,
            lr=1e-3,
            rank=2,
            basis="activations",
            refresh=4,
            momentum=momentum,
            rounding="nearest",
            **more,
        )
        for _ in range(12):
            opt.step(lambda model=model: model(tokens))
        opt.flush()
    base = model_and_tokens()[0]
    for one, two, start in zip(*(m.parameters() for m in (*models, base)), strict=True):
        moved = float((one - start).detach().abs().max())
        assert float((one - two).detach().abs().max()) < 1e-2 * moved + 1e-6


def test_micro_batches() -> None:
    whole, parts = model_and_tokens()[0], model_and_tokens()[0]
    tokens = model_and_tokens()[1]
    bases = []
    for model, size in ((whole, 4), (parts, 1)):
        opt = zo_fused.LOZO(model, lr=0.0, rank=1, basis="activations")

        def closure(model: nn.Module = model, size: int = size) -> Tensor:
            return torch.stack([model(part) for part in tokens.split(size)]).mean()

        opt.step(closure)
        bases.append([opt.state[p]["basis"] for p in model.parameters() if opt.state.get(p)])
    assert len(bases[0]) == 8
    for one, two in zip(*bases, strict=True):
        torch.testing.assert_close(one.abs(), two.abs(), rtol=1e-2, atol=1e-2)


def test_an_input_that_is_not_finite_skips_the_step() -> None:
    model = network()
    opt = zo_fused.LOZO(model, lr=1e-2, basis="activations")
    start = snapshot(model)
    opt.step(lambda: model(torch.full((3, 6), torch.inf)).mean())
    assert opt.skipped_steps == 1
    for now, before in zip(snapshot(model), start, strict=True):
        torch.testing.assert_close(now, before, rtol=0, atol=2.0**-22)
    opt.step(loss_of(model))
    assert opt.skipped_steps == 1
    assert "basis" in opt.state[model[0].weight]


class Experts(nn.Module):
    """The second of two layers gets nothing at first."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 4), nn.Linear(6, 4)
        self.both = False

    def forward(self, x: Tensor) -> Tensor:
        out = self.one(x)
        return out + self.two(x) if self.both else out


@pytest.mark.parametrize("others", ["random", "frozen"])
def test_a_layer_that_is_not_used(others: str, caplog: Any) -> None:
    torch.manual_seed(0)
    model, x = Experts(), torch.randn(5, 6)
    opt = zo_fused.LOZO(model, lr=1e-2, basis="activations", refresh=2, others=others)
    start = model.two.weight.detach().clone()
    with caplog.at_level(logging.INFO, "zo_fused"):
        opt.step(lambda: model(x).square().mean())
    opt.flush()
    stays = torch.equal(model.two.weight, start)
    assert stays == (others == "frozen")
    assert ("its layer was not used" in caplog.text) == (others == "random")
    model.both = True
    for _ in range(2):
        opt.step(lambda: model(x).square().mean())
    assert opt.state[model.two.weight]["basis"].any()


def test_a_step_that_must_see_inputs_needs_a_closure() -> None:
    model = network()
    opt = zo_fused.LOZO(model, basis="activations", refresh=2)
    with pytest.raises(RuntimeError, match="must be step\\(closure\\)"):
        opt.perturb(1.0)
    with pytest.raises(RuntimeError, match="must be step\\(closure\\)"):
        opt.step(loss_plus=1.0, loss_minus=0.0)
    opt.step(loss_of(model))
    opt.perturb(1.0)
    opt.step(loss_plus=1.0, loss_minus=0.0)
    with pytest.raises(RuntimeError, match="must be step\\(closure\\)"):
        opt.perturb(1.0)


@pytest.mark.parametrize(
    ("kw", "error"),
    [
        ({"basis": "inputs"}, "basis"),
        ({"others": "frozen"}, 'need basis="activations"'),
        ({"basis": "activations", "refresh": 3, "interval": 7}, "leave interval out"),
        ({"moments": "adam", "momentum": 0.9}, "momentum of its own"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(kw: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        zo_fused.LOZO(network(), **kw)
    with pytest.raises(ValueError, match="needs the module"):
        zo_fused.LOZO(network().parameters(), basis="activations")


def test_a_log_with_a_basis_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model, base, log = network(), network(), tmp_path / "log.jsonl"
    opt = zo_fused.LOZO(model, lr=1e-2, basis="activations", interval=3)
    opt.start_log(log)
    for _ in range(3):
        opt.step(loss_of(model))
    opt.close_log()
    lines = records_of(log)
    changed = [i for i, line in enumerate(lines) if "bases" in line and i > 0]
    assert len(changed) == 1
    bases = lines[changed[0]]
    zo_fused.replay(base, log)
    assert same(model, base)
    for entry, error in (
        ([0, "AAAA"], "no basis"),
        ([0, "AACAfw=="], "not finite"),
        ([9, bases["bases"][0][1]], "position in bases"),
        ([0, "AAAAAA=="], "basis of 1 numbers"),
    ):
        lines[changed[0]] = {"bases": [entry]}
        write_records(log, lines)
        with pytest.raises(ValueError, match=error):
            zo_fused.replay(network(), log)


def test_the_tied_head_is_no_layer_of_its_own() -> None:
    model = SmallTransformer()
    opt = zo_fused.LOZO(model, basis="activations", others="frozen")
    assert not any(p is model.embed.weight for p in opt.param_groups[0]["params"])
    assert len(opt.param_groups[0]["params"]) == len(opt.param_groups[0]["param_names"]) == 8


def test_the_command_line_may_refresh_what_a_recipe_has_for_the_whole_run() -> None:
    hyper = {**by_method()["zo-act"], "schedule": "plain", "refresh": 2}
    opt = make_optimizer("zo-act", hyper, network())
    assert opt.param_groups[0]["interval"] == 2


@pytest.mark.parametrize("name", ["agzo", "seezo"])
def test_the_command_line_has_blocks(name: str) -> None:
    pytest.importorskip("transformers")
    from support.tiny_models import causal_model

    model = causal_model("opt")
    hyper = {**by_method()[name], "schedule": "plain", "blocks": "sequential", "rank": 2}
    opt = make_optimizer(name, hyper, model)
    ids = torch.arange(6)[None]
    for _ in range(2):
        opt.step(lambda: model(input_ids=ids, labels=ids).loss)
    layers = model.model.decoder.layers
    assert "basis" in opt.state[layers[0].fc1.weight]
