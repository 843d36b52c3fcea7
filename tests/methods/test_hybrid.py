"""Hybrid: zeroth-order for the first layers, backpropagation for the last ones."""

from __future__ import annotations

import copy
import itertools
import math
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.families import MODELS, make
from support.models import masks_of_two_steps
from support.textbook import EPS, SEED, SmallTransformer, Weights, dense, model_and_tokens
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import zo_fused
import zo_fused.methods.hybrid
from bench.training.hybrid_memory import Saved
from zo_fused.step.optimizer import ZerothOrderOptimizer

STEPS = 50


pytestmark = pytest.mark.usefixtures("one_thread")


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1e-2, momentum=0.9, weight_decay=0.1)


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-3, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1)


ZEROTH: dict[str, Callable[..., ZerothOrderOptimizer]] = {
    "MeZO": lambda params, model, **kw: zo_fused.MeZO(params, **{"lr": 1e-3, "seed": SEED, **kw}),
    "MeZO deferred": lambda params, model, **kw: zo_fused.MeZO(
        params, **{"lr": 1e-3, "seed": SEED, "deferred": True, **kw}
    ),
    "MeZO one-sided": lambda params, model, **kw: zo_fused.MeZO(
        params, **{"lr": 1e-3, "seed": SEED, "one_sided": True, **kw}
    ),
    "LOZO": lambda params, model, **kw: zo_fused.LOZO(
        params, **{"lr": 1e-3, "seed": SEED, "interval": 3, **kw}
    ),
    "LOZO factored": lambda params, model, **kw: zo_fused.LOZO(
        params, mode="factored", module=model, **{"lr": 1e-3, "seed": SEED, "interval": 3, **kw}
    ),
    "ZOAdam": lambda params, model, **kw: zo_fused.ZOAdam(
        params, **{"lr": 1e-3, "seed": SEED, **kw}
    ),
}


@pytest.fixture(params=list(ZEROTH))
def zeroth(request: pytest.FixtureRequest) -> Callable[..., ZerothOrderOptimizer]:
    return ZEROTH[request.param]


def hybrid(
    model: nn.Module,
    zeroth: Callable[..., ZerothOrderOptimizer] = ZEROTH["MeZO"],
    first_order: Callable[[Any], torch.optim.Optimizer] = adamw,
    k: int = 1,
    **options: Any,
) -> zo_fused.Hybrid:
    first, rest = zo_fused.first_layers(model, k)
    return zo_fused.Hybrid(zeroth(first, model, **options), first_order(rest))


def snapshot(opt: zo_fused.Hybrid) -> list[Tensor]:
    """All weights, at theta."""
    opt.flush()
    return [p.detach().clone() for group in opt.param_groups for p in group["params"]]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def state_of(opt: zo_fused.Hybrid) -> dict[str, Any]:
    return copy.deepcopy({part: state["state"] for part, state in opt.state_dict().items()})


def assert_same_state(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_state(a[key], b[key])
    elif isinstance(a, Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


@contextmanager
def neither_part_moves(opt: zo_fused.Hybrid, model: nn.Module) -> Iterator[None]:
    """Weights, state and gradients are afterwards what they were: theta up to its two sweeps."""
    before, state = snapshot(opt), state_of(opt)
    yield
    for now, then in zip(snapshot(opt), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=1e-6)
    assert_same_state(state_of(opt), state)
    assert no_gradients(model)


def no_gradients(model: nn.Module) -> bool:
    return all(p.grad is None for p in model.parameters())


# ---- the mathematics ----------------------------------------------------------------------------


def textbook(
    loss: Callable[[Weights], Tensor],
    theta: Weights,
    zeroth: list[str],
    first_order: str,
    one_sided: bool,
) -> tuple[list[float], Weights]:
    """MeZO (lr 1e-3) on the parameters of `zeroth`; on the others SGD with momentum 0.9 (lr 1e-2),
    or AdamW (lr 1e-3, 0.9 and 0.99, 1e-6), decay 0.1, by the mean of both gradients."""
    projected = []
    rest = [k for k in theta if k not in zeroth]
    m = {k: torch.zeros_like(theta[k]) for k in rest}
    v = {k: torch.zeros_like(theta[k]) for k in rest}
    for t in range(STEPS):
        z = {k: dense(k, theta[k], t) for k in zeroth}
        losses, gradients = [], []
        for sign in (1, 0 if one_sided else -1):
            at = {k: w + sign * EPS * z[k] if k in z else w for k, w in theta.items()}
            leaves = [at[k].requires_grad_() for k in rest]
            value = loss(at)
            gradients.append(torch.autograd.grad(value, leaves))
            losses.append(value.item())
            at = {k: w.requires_grad_(False) for k, w in at.items()}
        g = (losses[0] - losses[1]) / (EPS if one_sided else 2 * EPS)
        projected.append(g)
        theta = {k: w - 1e-3 * g * z[k] if k in z else w.clone() for k, w in theta.items()}
        for k, plus, minus in zip(rest, *gradients, strict=True):
            d, w = (plus + minus) / 2, theta[k]
            if first_order == "sgd":
                m[k] = 0.9 * m[k] + d + 0.1 * w if t else d + 0.1 * w
                theta[k] = w - 1e-2 * m[k]
            else:
                m[k] = 0.9 * m[k] + 0.1 * d
                v[k] = 0.99 * v[k] + 0.01 * d**2
                m_hat, v_hat = m[k] / (1 - 0.9 ** (t + 1)), v[k] / (1 - 0.99 ** (t + 1))
                theta[k] = w - 1e-3 * 0.1 * w - 1e-3 * m_hat / (v_hat.sqrt() + 1e-6)
    return projected, theta


@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("first_order", ["sgd", "adamw"])
def test_fifty_float32_steps_follow_the_float64_textbook(first_order: str, one_sided: bool) -> None:
    """The loss is computed in float64 from float32 weights, so only weights, states and gradients
    are rounded, at 2**-24 relative: as in test_textbook.py that brings less than 1e-6 into a
    weight in 50 steps, and 2e-4 into g. AdamW divides by a root: where a gradient d is below 1e-3
    its change by such weights, about 1e-6, moves the weight by lr * 1e-6 / |d|, so a hundredth of
    the way at |d| = 1e-4; hence the rms over all weights, and not each of them.
    """
    model, tokens = model_and_tokens()
    first, rest = zo_fused.first_layers(model, 1)
    assert first
    assert rest

    def loss(weights: Weights) -> Tensor:
        return functional_call(model, {k: w.double() for k, w in weights.items()}, (tokens,))

    theta = {k: p.detach().double() for k, p in model.named_parameters()}
    expected, end = textbook(loss, theta, [k for k, _ in first], first_order, one_sided)
    zo = zo_fused.MeZO(first, lr=1e-3, eps=EPS, seed=SEED, one_sided=one_sided)
    opt = zo_fused.Hybrid(zo, {"sgd": sgd, "adamw": adamw}[first_order](rest))
    projected = []
    for _ in range(STEPS):
        opt.step(lambda: loss(dict(model.named_parameters())))
        assert opt.projected_grad is not None
        projected.append(opt.projected_grad.item())
    torch.testing.assert_close(torch.tensor(projected), torch.tensor(expected), rtol=0, atol=2e-4)
    for part in (first, rest):
        off = sum(float((p.detach() - end[k]).square().sum()) for k, p in part)
        moved = sum(float((end[k] - theta[k]).square().sum()) for k, _ in part)
        elements = sum(p.numel() for _, p in part)
        assert math.sqrt(off / elements) < 1e-6
        assert math.sqrt(moved / elements) > 1e-3


def test_the_gradient_is_that_at_theta_up_to_eps_squared() -> None:
    """Halving eps quarters the difference."""
    model, tokens = model_and_tokens()
    first, rest = zo_fused.first_layers(model, 1)
    model.double()  # rounding would hide the difference
    exact = torch.autograd.grad(model(tokens), [p for _, p in rest])
    off = []
    for eps in (4e-2, 2e-2):
        seen: list[Tensor] = []
        floats = [nn.Parameter(p.detach().float()) for _, p in first]
        zo = zo_fused.MeZO([(n, f) for (n, _), f in zip(first, floats, strict=True)], lr=0, eps=eps)
        opt = zo_fused.Hybrid(zo, torch.optim.SGD(rest, lr=0.0))
        opt.fo.register_step_pre_hook(lambda *_, seen=seen: seen.extend(p.grad for _, p in rest))

        def closure(floats: list[nn.Parameter] = floats) -> Tensor:
            at = {n: f.double() for (n, _), f in zip(first, floats, strict=True)}
            return functional_call(model, at, (tokens,))

        opt.step(closure)
        off.append(
            math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(seen, exact, strict=True)))
        )
    assert 3.5 < off[0] / off[1] < 4.5


@pytest.mark.parametrize("name", list(ZEROTH))
def test_gradients_are_divided_by_the_number_of_evaluations(name: str) -> None:
    """Where the first part plays no role, they are those of a plain backward pass, bit for bit."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(3, 4)
    zo = ZEROTH[name](list(model[0].named_parameters()), model)
    opt = zo_fused.Hybrid(zo, torch.optim.SGD(model[1].parameters(), lr=0.0))
    seen: list[Tensor] = []
    calls: list[int] = []
    opt.fo.register_step_pre_hook(
        lambda *_: seen.extend(p.grad.clone() for p in model[1].parameters())
    )

    def closure() -> Tensor:
        calls.append(1)
        return model[1](x).square().sum() + 0 * model[0](x).sum()

    opt.step(closure)
    exact = torch.autograd.grad(model[1](x).square().sum(), list(model[1].parameters()))
    assert len(calls) >= 2
    assert same(seen, list(exact))
    assert no_gradients(model)


def test_zeroth_order_part_moves_as_without_the_other(zeroth: Any) -> None:
    """With a first-order part that stands still, every bit of zo's steps is its own."""
    models = [model_and_tokens()[0] for _ in range(2)]
    tokens = model_and_tokens()[1]
    opt = hybrid(models[0], zeroth, lambda params: torch.optim.SGD(params, lr=0.0))
    alone = zeroth(zo_fused.first_layers(models[1], 1)[0], models[1])
    for _ in range(7):
        opt.step(lambda: models[0](tokens))
        alone.step(lambda: models[1](tokens))
        assert torch.equal(opt.projected_grad, alone.projected_grad)
    opt.flush()
    alone.flush()
    assert same([*models[0].parameters()], [*models[1].parameters()])


def test_either_part_may_come_first(zeroth: Any) -> None:
    """Backpropagation through perturbed layers, factored ones too: up to O(eps^2) it is as if the
    last layers were at theta."""
    model, tokens = model_and_tokens()
    rest, first = zo_fused.first_layers(model, 1)
    exact = torch.autograd.grad(model(tokens), [p for _, p in rest])
    opt = zo_fused.Hybrid(zeroth(first, model, eps=1e-4), torch.optim.SGD(rest, lr=0.0))
    seen: list[Tensor] = []
    opt.fo.register_step_pre_hook(lambda *_: seen.extend(p.grad.clone() for _, p in rest))
    opt.step(lambda: model(tokens))
    one_sided = bool(opt.zo.schedule.one_sided)  # then off by O(eps)
    for got, wanted in zip(seen, exact, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-3 if one_sided else 1e-5)


def test_it_learns(zeroth: Any) -> None:
    model, tokens = model_and_tokens()
    opt = hybrid(model, zeroth, lambda params: torch.optim.AdamW(params, lr=1e-2), lr=1e-4)
    first = model(tokens).item()
    for _ in range(60):
        opt.step(lambda: model(tokens))
    with opt.unperturbed(), torch.no_grad():
        assert model(tokens).item() < 0.7 * first


@pytest.mark.parametrize("zo_dtype", [torch.bfloat16, torch.float32])
def test_bf16(zo_dtype: torch.dtype) -> None:
    """All in bf16, or the first-order part alone."""
    model, tokens = model_and_tokens()
    model.bfloat16()
    for p in model.blocks[0].parameters():
        p.data = p.data.to(zo_dtype)
    embed = model.embed.register_forward_hook(lambda _, __, out: out.to(zo_dtype))
    out = model.blocks[0].register_forward_hook(lambda _, __, out: out.bfloat16())
    before = [p.detach().clone() for p in model.parameters()]
    opt = hybrid(model, first_order=lambda params: torch.optim.AdamW(params, lr=1e-2))
    first = model(tokens).item()
    for _ in range(40):
        opt.step(lambda: model(tokens).float())
    assert model(tokens).item() < 0.8 * first
    assert all(p.dtype == q.dtype for p, q in zip(model.parameters(), before, strict=True))
    assert no_gradients(model)
    embed.remove()
    out.remove()


class EvaluatesOnceMore(zo_fused.MeZO):
    """As methods do that try a candidate, or several directions."""

    def measure(self, closure: Any) -> tuple[Tensor, Tensor]:
        closure()
        return super().measure(closure)


def test_all_evaluations_count_however_many() -> None:
    """In the mean; and in the decision whether fo steps, though zo may judge by others."""
    model, tokens = model_and_tokens()
    first, rest = zo_fused.first_layers(model, 1)
    zo = EvaluatesOnceMore(first, lr=0.0, eps=1e-5)
    opt = zo_fused.Hybrid(zo, torch.optim.SGD(rest, lr=1.0))
    before = [p.detach().clone() for _, p in rest]
    exact = torch.autograd.grad(model(tokens), [p for _, p in rest])
    opt.step(lambda: model(tokens))
    for (_, p), start, gradient in zip(rest, before, exact, strict=True):
        torch.testing.assert_close(start - p.detach(), gradient, rtol=0, atol=1e-5)
    before = [p.detach().clone() for _, p in rest]
    calls = iter(range(3))
    opt.step(lambda: model(tokens) * (math.nan if next(calls) == 0 else 1.0))
    assert zo.skipped_steps == 0
    assert same([p.detach() for _, p in rest], before)


# ---- state --------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_order", [sgd, adamw])
def test_resume_is_bit_exact(zeroth: Any, first_order: Any) -> None:
    model, tokens = model_and_tokens()
    opt = hybrid(model, zeroth, first_order)
    for _ in range(4):
        opt.step(lambda: model(tokens))
    state = copy.deepcopy(opt.state_dict())  # puts the weights at theta
    twin = SmallTransformer()
    twin.load_state_dict(model.state_dict())
    other = hybrid(twin, zeroth, first_order, lr=9.0)
    other.load_state_dict(state)
    assert other.step_count == 4
    for _ in range(5):
        loss = opt.step(lambda: model(tokens))
        assert torch.equal(loss, other.step(lambda: twin(tokens)))
    assert same(snapshot(opt), snapshot(other))
    assert_same_state(state_of(opt), state_of(other))
    assert set(state) == {"zo", "fo"}


def test_groups() -> None:
    """Of either part, each with a learning rate of its own; frozen ones stay."""
    model, tokens = model_and_tokens()
    blocks = zo_fused.layer_blocks(model)
    frozen = model.blocks[1].norm1.weight.requires_grad_(False)
    zo = zo_fused.MeZO([{**blocks[0], "lr": 0.0}, {**blocks[1], "lr": 1e-2}], seed=SEED)
    named = blocks[2]["params"]
    halves = [{"params": named[:6], "lr": 0.0}, {"params": named[6:]}]
    opt = zo_fused.Hybrid(zo, torch.optim.SGD(halves, lr=1e-2))
    assert [group.get("block") for group in opt.param_groups] == [0, 1, None, None]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    still = {name for part in (blocks[0]["params"], named[:6]) for name, _ in part}
    for _ in range(3):
        opt.step(lambda: model(tokens))
    for name, p in model.named_parameters():
        if name in still or p is frozen:
            torch.testing.assert_close(p.detach(), before[name], rtol=0, atol=3e-6)  # 9 roundings
        else:
            assert not torch.equal(p.detach(), before[name]), name
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    opt.param_groups[-1]["lr"] = 0.5
    assert opt.fo.param_groups[-1]["lr"] == 0.5


def test_only_parameters_of_the_first_order_part_get_gradients() -> None:
    model, tokens = model_and_tokens()
    head = [p for _, p in zo_fused.first_layers(model, 2)[1]] or [model.blocks[1].down.bias]
    first = [(n, p) for n, p in model.blocks[0].named_parameters()]
    opt = zo_fused.Hybrid(zo_fused.MeZO(first), torch.optim.SGD(head, lr=0.0))
    seen: list[int] = []
    opt.fo.register_step_pre_hook(
        lambda *_: seen.extend(id(p) for p in model.parameters() if p.grad is not None)
    )
    opt.step(lambda: model(tokens))
    assert seen == [id(p) for p in head]


def test_a_frozen_first_order_part_leaves_plain_zeroth_order_steps() -> None:
    models = [model_and_tokens()[0] for _ in range(2)]
    tokens = model_and_tokens()[1]
    for model in models:
        model.blocks[1].requires_grad_(False)
    opt = hybrid(models[0])
    alone = zo_fused.MeZO(zo_fused.first_layers(models[1], 1)[0], lr=1e-3, seed=SEED)
    for _ in range(3):
        opt.step(lambda: models[0](tokens))
        alone.step(lambda: models[1](tokens))
    assert same([*models[0].parameters()], [*models[1].parameters()])


# ---- activations --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["OPT", "Llama"])
@pytest.mark.parametrize("mode", ["inplace", "factored"])
def test_activations_fall_with_the_layers_that_are_zeroth_order(family: str, mode: str) -> None:
    """Linearly in k, as every layer keeps as much as the next; what is left at k = L is the head's,
    and full backpropagation keeps no less than k = 0."""
    transformers = pytest.importorskip("transformers")
    cls, config, options, *_ = MODELS[family]
    layers = 6
    options = {**options, "num_hidden_layers": layers}
    torch.manual_seed(0)
    model = getattr(transformers, cls)(getattr(transformers, config)(**options)).eval()
    ids = torch.randint(0, 61, (4, 32))

    def closure() -> Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    full = Saved(model)
    full.watch(closure)()
    kept = []
    for k in range(layers + 1):
        first, rest = zo_fused.first_layers(model, k)
        zo = zo_fused.LOZO(first, mode=mode, module=model if mode == "factored" else None)
        saved = Saved(model)
        zo_fused.Hybrid(zo, torch.optim.SGD(rest, lr=0.0)).step(saved.watch(closure))
        kept.append(saved.most)
    drops = [a - b for a, b in itertools.pairwise(kept)]
    assert kept[0] <= full.most
    assert min(drops) > 0.1 * full.most  # a sixth, less the share of the head
    inner = drops[:-1]  # the last layer's output is kept by the head all the same
    assert max(inner) < 1.1 * min(inner)
    assert kept[-1] < 0.3 * full.most


# ---- guards -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("call", [0, 1])
def test_a_loss_that_is_not_finite_moves_neither_part(zeroth: Any, value: float, call: int) -> None:
    model, tokens = model_and_tokens()
    opt = hybrid(model, zeroth)
    opt.step(lambda: model(tokens))
    before, calls = snapshot(opt), iter(range(10))
    with neither_part_moves(opt, model):
        opt.step(lambda: model(tokens) * (value if next(calls) == call else 1.0))
    assert (opt.zo.skipped_steps, opt.step_count) == (1, 2)
    opt.step(lambda: model(tokens))
    assert not same(snapshot(opt), before)


def test_an_estimate_beyond_float32_moves_neither_part() -> None:
    """Finite losses whose difference over 2 eps is not: zo skips, so fo must."""
    model, tokens = model_and_tokens()
    opt = hybrid(model)
    calls = iter((1e37, 1.0))
    with neither_part_moves(opt, model):
        opt.step(lambda: model(tokens) * next(calls))
    assert opt.zo.skipped_steps == 1


@pytest.mark.parametrize("call", [0, 1])
@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_closure_that_raises_leaves_theta(zeroth: Any, call: int, error: BaseException) -> None:
    model, tokens = model_and_tokens()
    opt = hybrid(model, zeroth)
    opt.step(lambda: model(tokens))
    calls = iter(range(10))

    def closure() -> Tensor:
        if next(calls) == call:
            raise error
        return model(tokens)

    with neither_part_moves(opt, model), pytest.raises(type(error)):
        opt.step(closure)
    assert opt.step_count == 1
    assert all(p.requires_grad for p in model.parameters())
    opt.step(lambda: model(tokens))
    assert opt.step_count == 2


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("where", ["closure", "backward", "sweep", "fo.step"])
def test_ctrl_c_leaves_both_parts_at_the_same_step(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets through in an evaluation, which is then undone; a step of fo is completed."""
    model, tokens = model_and_tokens()
    opt = hybrid(model)
    opt.step(lambda: model(tokens))
    before = snapshot(opt)
    if where == "sweep":
        sweep = opt.zo.direction.sweep
        monkeypatch.setattr(
            opt.zo.direction, "sweep", lambda *a, **kw: (interrupt(), sweep(*a, **kw))
        )
    if where == "fo.step":
        opt.fo.register_step_pre_hook(lambda *_: interrupt())

    def closure() -> Tensor:
        loss = model(tokens)
        if where == "closure":
            interrupt()
        if where == "backward":
            loss.register_hook(lambda _: interrupt())
        return loss

    with pytest.raises(KeyboardInterrupt):
        opt.step(closure)
    done = 2 if where == "fo.step" else 1
    assert opt.step_count == done
    steps = {int(state["step"]) for state in opt.fo.state.values()}
    assert steps == {done}
    if done == 1:
        for now, then in zip(snapshot(opt), before, strict=True):
            torch.testing.assert_close(now, then, rtol=0, atol=1e-6)
    assert no_gradients(model)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("bad", [None, 0.3, torch.ones(2)])
def test_what_is_no_scalar_tensor_is_refused(bad: Any) -> None:
    model, tokens = model_and_tokens()
    opt = hybrid(model)
    with pytest.raises(TypeError, match="scalar loss as a tensor"):
        opt.step(lambda: bad)
    with pytest.raises(ValueError, match="depends on no parameter of fo"):
        opt.step(lambda: model(tokens).detach())
    assert opt.step_count == 0
    assert opt.step(lambda: model(tokens).reshape(1, 1)).shape == ()


def test_gradients_that_were_there_play_no_role() -> None:
    models = [model_and_tokens()[0] for _ in range(2)]
    tokens = model_and_tokens()[1]
    one, two = (hybrid(model) for model in models)
    for p in models[0].blocks[1].parameters():
        p.grad = torch.ones_like(p)
    one.step(lambda: models[0](tokens))
    two.step(lambda: models[1](tokens))
    assert same(snapshot(one), snapshot(two))


def test_gradients_are_enabled_also_where_the_caller_disabled_them() -> None:
    model, tokens = model_and_tokens()
    opt = hybrid(model)
    before = snapshot(opt)
    with torch.no_grad():
        opt.step(lambda: model(tokens))
    assert not any(torch.equal(a, b) for a, b in zip(snapshot(opt), before, strict=True))


def test_dropout_is_the_same_in_all_evaluations() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 64), nn.Dropout(0.5))
    first = list(model[0].named_parameters())
    opt = zo_fused.Hybrid(zo_fused.MeZO(first), torch.optim.SGD(model[1].parameters(), lr=0.0))
    masks = masks_of_two_steps(opt, model)
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])


def test_gradient_checkpointing() -> None:
    """The recomputation in backward sees the same perturbed weights."""
    models = [model_and_tokens()[0] for _ in range(2)]
    tokens = model_and_tokens()[1]
    one, two = (hybrid(model, ZEROTH["LOZO factored"]) for model in models)
    block = models[0].blocks[1]
    inner = block.forward
    block.forward = lambda x: checkpoint(inner, x, use_reentrant=False)  # type: ignore[method-assign]
    for _ in range(4):
        one.step(lambda: models[0](tokens))
        two.step(lambda: models[1](tokens))
    assert same(snapshot(one), snapshot(two))


def test_gradients_of_a_step_that_starts_over_do_not_count() -> None:
    """LOZO factored evaluates again when it meets a weight that has no side path."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4))
    x = torch.randn(3, 4)
    zo = ZEROTH["LOZO factored"](list(model[0].named_parameters()), model, eps=1e-5)
    opt = zo_fused.Hybrid(zo, torch.optim.SGD(model[1].parameters(), lr=0.0))
    exact = torch.autograd.grad(model(x).square().mean(), list(model[1].parameters()))
    seen: list[Tensor] = []
    opt.fo.register_step_pre_hook(
        lambda *_: seen.extend(p.grad.clone() for p in model[1].parameters())
    )
    calls: list[int] = []

    def closure() -> Tensor:
        calls.append(1)
        loss = model(x).square().mean()
        if len(calls) == 1:
            return 100 * loss  # gives other gradients than the evaluations that count
        return loss + 0 * model[0].weight.square().sum()  # no side path

    opt.step(closure)
    assert len(calls) == 4
    for got, wanted in zip(seen, exact, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


# ---- what is refused ----------------------------------------------------------------------------


def test_optimizers_of_other_kinds_are_refused() -> None:
    model, _ = model_and_tokens()
    first, rest = zo_fused.first_layers(model, 1)
    zo, fo = zo_fused.MeZO(first), adamw(rest)
    with pytest.raises(TypeError, match=r"zo must be .* got ForwardGrad"):
        zo_fused.Hybrid(zo_fused.ForwardGrad(model.blocks[0]), fo)
    with pytest.raises(TypeError, match=r"zo must be .* got AdamW"):
        zo_fused.Hybrid(fo, fo)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"fo must be .* got MeZO"):
        zo_fused.Hybrid(zo, zo_fused.MeZO(rest))
    with pytest.raises(TypeError, match="LBFGS"):
        zo_fused.Hybrid(zo, torch.optim.LBFGS([p for _, p in rest]))
    paired = zo_fused.LOZO(first, mode="factored", module=model, paired=True)
    with pytest.raises(ValueError, match="paired=False"):
        zo_fused.Hybrid(paired, fo)


def test_shared_parameters_are_refused_by_name() -> None:
    model, _ = model_and_tokens()
    first, rest = zo_fused.first_layers(model, 1)
    with pytest.raises(ValueError, match=r"'blocks\.1\.norm1\.weight' is in both"):
        zo_fused.Hybrid(zo_fused.MeZO(model), adamw(rest))
    with pytest.raises(ValueError, match=r"of shape \(31, 16\) is in both"):
        zo_fused.Hybrid(zo_fused.MeZO(first), adamw([model.head.weight]))
    alias = nn.Parameter(model.embed.weight.data)  # another Parameter over the same memory
    with pytest.raises(ValueError, match="in both"):
        zo_fused.Hybrid(zo_fused.MeZO(first), adamw([alias]))


def test_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = model_and_tokens()
    opt = hybrid(model)
    monkeypatch.setattr(zo_fused.methods.hybrid, "capturing", lambda: True)
    with pytest.raises(RuntimeError, match="can't be captured"):
        opt.step(lambda: model(tokens))


# ---- models of transformers ---------------------------------------------------------------------


@pytest.mark.parametrize("family", ["OPT", "Llama", "GPT-2", "RoBERTa"])
@pytest.mark.parametrize("name", ["MeZO", "LOZO factored"])
def test_models_of_transformers(family: str, name: str) -> None:
    """OPT and GPT-2 tie their heads to the embeddings, which are of the zeroth-order part."""
    transformers = pytest.importorskip("transformers")
    cls, config, options, *_ = MODELS[family]
    options = {key: value for key, value in options.items() if key != "word_embed_proj_dim"}
    torch.manual_seed(0)
    model = getattr(transformers, cls)(getattr(transformers, config)(**options)).eval()
    ids = torch.randint(2, 61, (4, 12))
    labels = torch.tensor([0, 1, 1, 0]) if family == "RoBERTa" else ids
    opt = hybrid(model, ZEROTH[name], lambda ps: torch.optim.AdamW(ps, lr=1e-2), k=2, lr=1e-4)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    first = float(opt.step(lambda: model(input_ids=ids, labels=labels).loss))
    for _ in range(20):
        last = float(opt.step(lambda: model(input_ids=ids, labels=labels).loss))
    assert last < first
    opt.flush()
    unmoved = [n for n, p in model.named_parameters() if torch.equal(p, before[n])]
    assert all("pooler" in n or "token_type" in n for n in unmoved), unmoved
    assert no_gradients(model)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about what peft calls
def test_peft() -> None:
    """LoRA: adapters of the first layers by LOZO, those of the last by AdamW."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(make("Llama"), config).eval()
    ids = torch.randint(2, 61, (4, 12))
    opt = hybrid(model, ZEROTH["LOZO"], k=2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(3):
        opt.step(lambda: model(input_ids=ids, labels=ids).loss)
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n]) == ("lora_" not in n), n
