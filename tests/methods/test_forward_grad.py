"""ForwardGrad: the directional derivative is that of autograd."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.textbook import SmallTransformer, Weights, dense, model_and_tokens
from torch import Tensor, nn

import zo_fused

STEPS, SEED = 50, 11  # SEED: that of `dense`


pytestmark = pytest.mark.usefixtures("one_thread")


def textbook(
    loss: Callable[[Weights], Tensor], theta: Weights, lr: float, wd: float
) -> tuple[list[float], Weights]:
    grads = []
    for t in range(STEPS):
        leaves = {k: w.clone().requires_grad_() for k, w in theta.items()}
        gradient = torch.autograd.grad(loss(leaves), list(leaves.values()))
        z = {k: dense(k, w, t) for k, w in theta.items()}
        g = float(sum((d * z[k]).sum() for k, d in zip(leaves, gradient, strict=True)))
        theta = {k: w - lr * (g * z[k] + wd * w) for k, w in theta.items()}
        grads.append(g)
    return grads, theta


def test_fifty_float32_steps_follow_the_float64_textbook() -> None:
    """The derivative is a sum of some thousand float32 products, of about 1 each at most: relative
    to the norm of gradient and z (about 40) its error is some 1e-6, and lr = 3e-4 brings 1e-8 of it
    into the weights in a step. A weight of up to 4 is rounded 50 times, by at most 2.4e-7."""
    model, tokens = model_and_tokens()
    theta = {k: p.detach().double() for k, p in model.named_parameters()}

    def loss(weights: Weights) -> Tensor:
        return torch.func.functional_call(model, weights, (tokens,))

    expected, end = textbook(loss, theta, 3e-4, 0.5)
    opt = zo_fused.ForwardGrad(model, lr=3e-4, weight_decay=0.5, seed=SEED)
    grads = []
    for _ in range(STEPS):
        opt.step(lambda: model(tokens))
        grads.append(opt.projected_grad.item())
    torch.testing.assert_close(torch.tensor(grads), torch.tensor(expected), rtol=0, atol=2e-4)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach().double(), end[name], rtol=0, atol=1.2e-5)
    assert opt.step_count == STEPS


def test_returns_the_loss_at_theta_and_sweeps_once(sweeps: list[str]) -> None:
    model, tokens = model_and_tokens()
    opt = zo_fused.ForwardGrad(model, seed=SEED)
    before = model(tokens).item()
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        return model(tokens)

    assert opt.step(closure).item() == pytest.approx(before, rel=1e-6)
    assert (calls, sweeps) == (1, ["dense_"])
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_and_replay(dtype: torch.dtype, tmp_path: Path) -> None:
    model, tokens = model_and_tokens()
    model.to(dtype)
    opt = zo_fused.ForwardGrad(model, lr=1e-3, seed=SEED)
    opt.start_log(tmp_path / "log.jsonl")
    for _ in range(4):
        opt.step(lambda: model(tokens))
    twin, _ = model_and_tokens()
    twin.to(dtype).load_state_dict(model.state_dict())
    again = zo_fused.ForwardGrad(twin, lr=9.0)
    again.load_state_dict(opt.state_dict())
    for m, o in ((model, opt), (twin, again)):
        for _ in range(3):
            o.step(lambda m=m: m(tokens))
    base = model_and_tokens()[0].to(dtype)
    zo_fused.replay(base, tmp_path / "log.jsonl")
    for p, q, r in zip(model.parameters(), twin.parameters(), base.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_models_of_transformers(attention: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.OPTConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64,
        max_position_embeddings=32, word_embed_proj_dim=32, dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    ids = torch.randint(2, 61, (3, 10))
    model(input_ids=ids, labels=ids).loss.backward()
    opt = zo_fused.ForwardGrad(model.eval(), lr=0.0, seed=SEED)
    opt.step(lambda: model(input_ids=ids, labels=ids).loss)
    expected = sum((p.grad * dense(n, p, 0)).sum() for n, p in model.named_parameters())
    assert opt.projected_grad.item() == pytest.approx(float(expected), rel=1e-3, abs=1e-3)


class Opaque(torch.autograd.Function):
    """An operator with no forward-mode derivative, as fused kernels are."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad * 2


def test_what_has_no_tangent_is_an_error_and_weights_stay() -> None:
    model, tokens = model_and_tokens()
    before = [p.detach().clone() for p in model.parameters()]
    opt = zo_fused.ForwardGrad(model)
    with pytest.raises(ValueError, match="no tangent"):
        opt.step(lambda: torch.tensor(1.0))
    with pytest.raises(TypeError):
        opt.step(lambda: 1.0)
    with pytest.raises((NotImplementedError, RuntimeError), match=r"forward|jvp"):
        opt.step(lambda: Opaque.apply(model(tokens)))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert opt.step_count == 0
    frozen = SmallTransformer().requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to tune"):
        zo_fused.ForwardGrad(frozen).step(lambda: frozen(tokens))


@pytest.mark.filterwarnings("ignore")  # of transformers, about its own models
@pytest.mark.parametrize(
    ("kind", "cure"),
    [("qwen3_moe", "experts_implementation='eager'"), ("bloom", "no forward-mode derivative: ")],
)
def test_operators_without_a_tangent_are_named_with_their_cure(kind, cure):
    pytest.importorskip("transformers")
    from support import tiny_models

    model = tiny_models.causal_model(kind)
    before = {name: p.clone() for name, p in model.named_parameters()}
    x = torch.randint(7, 100, (2, 5), generator=torch.Generator().manual_seed(0))
    optimizer = zo_fused.ForwardGrad(model, lr=1e-6)
    with pytest.raises(NotImplementedError) as refusal:
        optimizer.step(lambda: model(input_ids=x, labels=x).loss)
    assert str(refusal.value).startswith("ForwardGrad: the model uses an operator")
    assert cure in str(refusal.value)
    assert "attn_implementation" not in str(refusal.value)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    if kind == "qwen3_moe":
        model.set_experts_implementation("eager")
        assert torch.isfinite(optimizer.step(lambda: model(input_ids=x, labels=x).loss))
