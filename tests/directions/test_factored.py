"""Factored steps: the trajectory of in-place LOZO, without writing the weights within a window."""

from __future__ import annotations

import copy
import io
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.equality import in_memory
from torch import Tensor, nn

import zo_fused

transformers = pytest.importorskip("transformers")


class Small(nn.Module):
    """Tied embedding and head, a norm, and a matrix that is used as no layer uses it."""

    def __init__(self, odd: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(13, 8)
        self.embed.weight.data *= 0.3
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 13, bias=False)
        self.head.weight = self.embed.weight
        self.odd = nn.Parameter(torch.randn(8, 8) * 0.1) if odd else None

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.down(torch.tanh(self.up(self.norm(x))))
        if self.odd is not None:
            x = x + x.square() @ (self.odd * 2)
        return self.head(x)


def tokens() -> Tensor:
    return torch.randint(0, 13, (4, 6), generator=torch.Generator().manual_seed(1))


def loss_of(model: nn.Module) -> Callable[[], Tensor]:
    ids = tokens()

    def loss() -> Tensor:
        logits = model(ids)[:, :-1].float().flatten(0, 1)
        return nn.functional.cross_entropy(logits, ids[:, 1:].flatten())

    return loss


def lozo(model: nn.Module, **kw: Any) -> zo_fused.LOZO:
    return zo_fused.LOZO(model, **{"lr": 2e-3, "eps": 1e-2, "interval": 7, "seed": 5, **kw})


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def go_on(opt: zo_fused.LOZO, model: nn.Module, steps: int) -> None:
    for _ in range(steps):
        opt.step(loss_of(model))
    opt.flush()


def trajectory(
    model: nn.Module, loss: Callable[[], Tensor], steps: int = 30, **kw: Any
) -> tuple[Tensor, Tensor]:
    """Weights at the end, and all projected gradients."""
    opt = lozo(model, **kw)
    grads = []
    for _ in range(steps):
        opt.step(loss)
        grads.append(opt.projected_grad)
    opt.flush()
    return weights(model), torch.stack(grads)


OPTIONS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "momentum": {"momentum": 0.9},
    "decay": {"weight_decay": 0.5},
    "momentum, decay, paper's 1/r": {
        "momentum": 0.5, "weight_decay": 0.5, "rank": 3, "divide_by_rank": True,
    },
    "interval 1": {"interval": 1},
    "ends within a window": {"interval": 100},
}  # fmt: skip


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("options", list(OPTIONS))
@pytest.mark.parametrize("odd", [False, True])
def test_follows_the_in_place_trajectory(options: str, paired: bool, odd: bool) -> None:
    """Tolerance. Losses near 2.6 carry float32 rounding of some 2**-22 (sums of 100 terms), so g =
    dL / (2 eps) differs by up to 2 * 2**-22 / 0.02 = 2e-5; 30 such steps with lr = 2e-3 and |z| < 6
    move a weight by less than sqrt(30) * 2e-3 * 2e-5 * 6 = 1.3e-6, and the curvature of the loss
    carries that on.
    """
    kw = OPTIONS[options]
    one, two = Small(odd), Small(odd)
    expected, grads = trajectory(one, loss_of(one), **kw)
    found, found_grads = trajectory(two, loss_of(two), mode="factored", paired=paired, **kw)
    assert (expected - weights(Small(odd))).abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-5)
    torch.testing.assert_close(found_grads, grads, rtol=0, atol=3e-4)


def hf_model(name: str) -> nn.Module:
    """The architectures' own layers, in small."""
    common = {"vocab_size": 61, "max_position_embeddings": 32}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {
        "opt": lambda: transformers.OPTConfig(
            **common, **sizes, ffn_dim=64, word_embed_proj_dim=32, dropout=0.0
        ),
        "llama": lambda: transformers.LlamaConfig(
            **common, **sizes, intermediate_size=64, num_key_value_heads=2
        ),
        "qwen": lambda: transformers.Qwen2Config(
            **common, **sizes, intermediate_size=64, num_key_value_heads=2, tie_word_embeddings=True
        ),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=61, n_positions=32, n_embd=32, n_layer=2, n_head=4,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        ),
    }[name]()  # fmt: skip
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def hf_loss(model: nn.Module) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(2, 61, (3, 10), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    return lambda: model(input_ids=ids, attention_mask=mask, labels=ids).loss


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("name", ["opt", "llama", "qwen", "gpt2"])
def test_models_of_transformers(name: str, paired: bool, caplog: pytest.LogCaptureFixture) -> None:
    """No matrix of these models needs to be perturbed in place. Tolerance as above."""
    one, two = hf_model(name), hf_model(name)
    kw = {"lr": 1e-3, "interval": 4, "momentum": 0.5}
    expected, _ = trajectory(one, hf_loss(one), 10, **kw)
    with caplog.at_level(logging.INFO, "zo_fused"):
        found, _ = trajectory(two, hf_loss(two), 10, mode="factored", paired=paired, **kw)
    assert (expected - weights(hf_model(name))).abs().max() > 0.005
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-5)
    assert "in place" not in caplog.text


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about what peft calls
def test_peft() -> None:
    peft = pytest.importorskip("peft")
    found = []
    for mode in ("inplace", "factored"):
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        torch.manual_seed(1)
        model = peft.get_peft_model(hf_model("opt"), config)
        frozen = copy.deepcopy(model.base_model.model.model.decoder.embed_tokens.weight)
        found.append(trajectory(model, hf_loss(model), 10, mode=mode)[0])
        assert torch.equal(model.base_model.model.model.decoder.embed_tokens.weight, frozen)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=3e-5)


@pytest.mark.slow
def test_compiled_model() -> None:
    """One compilation serves all steps: perturbations and windows change values only."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    one, two = hf_model("opt"), hf_model("opt")
    expected, _ = trajectory(one, hf_loss(one), 12, interval=3)
    compiled = torch.compile(two, backend=counter)
    opt = lozo(two, mode="factored", interval=3)
    loss = hf_loss(compiled)
    graphs = []
    for _ in range(12):
        opt.step(loss)
        graphs.append(counter.frame_count)
    opt.flush()
    torch.testing.assert_close(weights(two), expected, rtol=0, atol=3e-5)
    assert graphs[-1] == graphs[1] > 0


# ---- what is written, and when ------------------------------------------------------------------


def test_matrices_are_written_once_a_window(sweeps: list[str]) -> None:
    model = Small()
    opt = lozo(model, mode="factored")
    matrices = [p for p in model.parameters() if p.dim() == 2]
    before = [p.detach().clone() for p in matrices]
    changed, counts = [], []
    for _ in range(21):
        sweeps.clear()
        opt.step(loss_of(model))
        with torch._C.DisableTorchFunctionSubclass():  # what lies in memory
            changed.append(not all(map(torch.equal, matrices, before)))
            before = [p.detach().clone() for p in matrices]
        counts.append(len(sweeps))
    assert changed == 3 * [*6 * [False], True]
    assert counts == 3 * [*6 * [3], 4]  # the vectors', and the window's


def test_the_module_holds_its_own_parameters() -> None:
    model = Small()
    own = dict(model.named_parameters())
    opt = lozo(model, mode="factored")

    def unchanged() -> bool:
        now = dict(model.named_parameters())
        return now.keys() == own.keys() and all(now[name] is own[name] for name in own)

    opt.step(loss_of(model))
    assert unchanged()
    with pytest.raises(ZeroDivisionError):
        opt.step(lambda: 1 / 0)
    assert unchanged()
    with opt.perturbed(+1):
        assert not unchanged()
    assert unchanged()


def test_flush_shows_theta_in_the_middle_of_a_window() -> None:
    one, two = Small(), Small()
    plain, opt = lozo(one), lozo(two, mode="factored")
    for _ in range(10):
        plain.step(loss_of(one))
        opt.step(loss_of(two))
    stale = in_memory(two)
    with opt.unperturbed():
        torch.testing.assert_close(weights(two), weights(one), rtol=0, atol=3e-5)
    assert (stale - weights(two)).abs().max() > 1e-3
    plain.step(loss_of(one))
    opt.step(loss_of(two))
    two.state_dict()
    torch.testing.assert_close(weights(two), weights(one), rtol=0, atol=3e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lr_g", [1e-6, 1e-5])
def test_16_bits_follow_float32_more_closely_than_in_place(dtype: torch.dtype, lr_g: float) -> None:
    """The same projected gradients; the distance from where float32 weights go. In place it is the
    random walk of three roundings a step; here there is one rounding a window: with 200 steps in 4
    windows sqrt(600 / 4) = 12 times less at best, four times asserted."""

    def end(dtype: torch.dtype, **kw: Any) -> Tensor:
        torch.manual_seed(0)
        model = nn.Linear(256, 256, bias=False).to(torch.float16).to(dtype)
        opt = lozo(model, lr=lr_g, eps=1e-3, interval=50, **kw)
        for _ in range(200):
            opt.perturb(+1)
            opt.perturb(-1)
            opt.step(loss_plus=2e-3, loss_minus=0.0)
        opt.flush()
        return weights(model)

    if dtype == torch.bfloat16:  # weights that both dtypes have
        original = end
        end = lambda d, **kw: original(d, **kw)  # noqa: E731
    exact = end(torch.float32)
    start = weights(nn.Linear(256, 256, bias=False))
    assert start.numel() == exact.numel()
    in_place = (end(dtype) - exact).square().mean().sqrt()
    factored = (end(dtype, mode="factored", rounding="nearest") - exact).square().mean().sqrt()
    assert factored < in_place / 4


def test_rounding_is_stochastic_by_default() -> None:
    """Updates of a window that are far below a last place arrive on average. 200 steps of lr g =
    1e-7 and a rank of 2: a window adds up to some 1e-6, a last place of bf16 near 0.02 is 1.2e-4.
    Standard error of the slope from what the rounding adds: see the assertion.
    """
    torch.manual_seed(0)
    start = torch.randn(512, 512) * 0.02
    ends = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.Linear(512, 512, bias=False, dtype=dtype)
        model.weight.data.copy_(start.bfloat16())
        opt = lozo(model, lr=1e-7, eps=1e-3, interval=50, mode="factored")
        assert opt.param_groups[0]["rounding"] == "stochastic"
        for _ in range(200):
            opt.perturb(+1)
            opt.perturb(-1)
            opt.step(loss_plus=2e-3, loss_minus=0.0)
        opt.flush()
        ends[dtype] = (model.weight.detach().double() - start.bfloat16().double()).flatten()
    asked, moved = ends[torch.float32], ends[torch.bfloat16]
    slope = float(asked @ moved / (asked @ asked))
    error = float((moved - slope * asked).norm() / asked.norm() / len(asked) ** 0.5)
    assert abs(slope - 1) < 4 * error < 0.5


# ---- matrices that are used otherwise -----------------------------------------------------------


def test_a_matrix_used_otherwise_is_named_and_perturbed_in_place(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Small(odd=True)
    opt = lozo(model, mode="factored")
    before = model.odd.detach().clone()
    with caplog.at_level(logging.INFO, "zo_fused"):
        for _ in range(3):
            opt.step(loss_of(model))
    assert caplog.text.count("parameter odd is perturbed in place") == 1
    assert not torch.equal(model.odd, before)
    everyone = [name for name, _ in model.named_parameters()]
    assert opt.param_groups[0]["in_place"] == (everyone.index("odd"),)


def test_use_outside_the_module_is_noticed() -> None:
    """The closure computes with a weight itself: a side path in the module would be half of it."""
    one, two = Small(), Small()

    def loss(model: Small) -> Callable[[], Tensor]:
        inner = loss_of(model)
        return lambda: inner() + model_up(model).square().mean()

    def model_up(model: Small) -> Tensor:
        return torch.ones(8) @ held[model].t()

    held = {model: model.up.weight for model in (one, two)}
    expected, _ = trajectory(one, loss(one))
    found, _ = trajectory(two, loss(two), mode="factored")
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-5)


def test_parameters_of_another_module_are_perturbed_in_place(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, extra = Small(), nn.Parameter(torch.ones(3, 4))
    groups = [{"params": [*model.named_parameters(), ("extra", extra)]}]
    opt = lozo(groups, module=model, mode="factored")
    with caplog.at_level(logging.INFO, "zo_fused"):
        opt.step(lambda: loss_of(model)() + extra.square().mean())
    assert "extra" in caplog.text
    assert not torch.equal(extra, torch.ones(3, 4))


# ---- state and logs -----------------------------------------------------------------------------


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_and_replay_are_bit_exact(
    dtype: torch.dtype, momentum: float, paired: bool, tmp_path: Path
) -> None:
    def make(model: nn.Module) -> zo_fused.LOZO:
        kw = {"rounding": "stochastic", "weight_decay": 0.1}
        return lozo(model, mode="factored", paired=paired, momentum=momentum, **kw)

    model = Small(odd=True).to(dtype)
    opt = make(model)
    opt.start_log(tmp_path / "log.jsonl")
    file = io.BytesIO()
    for step in range(12):
        if step == 4:
            torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
        opt.step((lambda: torch.tensor(math.nan)) if step == 2 else loss_of(model))
    opt.flush()
    assert opt.skipped_steps == 1

    base = Small(odd=True).to(dtype)
    zo_fused.replay(base, tmp_path / "log.jsonl")
    assert torch.equal(weights(base), weights(model))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = Small(odd=True).to(dtype)
    resumed.load_state_dict(saved["model"])
    again = make(resumed)
    again.load_state_dict(saved["opt"])
    go_on(again, resumed, steps=8)
    assert torch.equal(weights(resumed), weights(model))


def test_copies_go_on_alike() -> None:
    model = Small()
    opt = lozo(model, mode="factored", momentum=0.9)
    go_on(opt, model, steps=3)
    twin, other = copy.deepcopy((model, opt))
    go_on(opt, model, steps=5)
    go_on(other, twin, steps=5)
    assert torch.equal(weights(twin), weights(model))


def test_what_is_beside_the_weights_is_not_lost_in_a_copy() -> None:
    model = Small()
    opt = lozo(model, mode="factored")
    opt.step(loss_of(model))
    stale = in_memory(model)
    twin, other = copy.deepcopy((model, opt))
    assert torch.equal(in_memory(twin), in_memory(model))
    assert not torch.equal(in_memory(twin), stale)
    go_on(opt, model, steps=1)
    go_on(other, twin, steps=1)
    assert torch.equal(in_memory(twin), in_memory(model))


def test_loading_weights_in_the_middle_of_a_window() -> None:
    """Back to a checkpoint in the same process: nothing of the abandoned steps is left."""
    for kw in ({"mode": "factored"}, {"deferred": True}):
        model = Small()
        opt = lozo(model, rounding="nearest", **kw)
        opt.step(loss_of(model))
        saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
        for _ in range(3):
            opt.step(loss_of(model))
        model.load_state_dict(saved[0])
        opt.load_state_dict(saved[1])
        opt.flush()
        assert all(torch.equal(w, saved[0][name]) for name, w in model.state_dict().items())


def test_weights_moved_in_the_middle_of_a_window() -> None:
    one, two = Small(), Small()
    plain, opt = lozo(one), lozo(two, mode="factored")
    for step in range(9):
        plain.step(loss_of(one))
        opt.step(loss_of(two))
        if step == 4:
            two.up.weight.data = two.up.weight.data.clone()
    opt.flush()
    torch.testing.assert_close(weights(two), weights(one), rtol=0, atol=3e-5)


# ---- arguments ----------------------------------------------------------------------------------


def test_arguments_that_do_not_fit() -> None:
    model = Small()
    with pytest.raises(ValueError, match="needs the module"):
        zo_fused.LOZO(model.named_parameters(), mode="factored")
    with pytest.raises(ValueError, match="inplace"):
        zo_fused.LOZO(model, mode="beside")
    with pytest.raises(ValueError, match="deferred"):
        zo_fused.LOZO(model, mode="factored", deferred=True)
    with pytest.raises(ValueError, match="paired"):
        zo_fused.LOZO(model, paired=True)


def test_a_paired_closure_must_be_one_that_can_be_batched() -> None:
    model = Small()
    opt = lozo(model, mode="factored", paired=True)
    before = weights(model)
    with pytest.raises(TypeError, match="paired=True"):
        opt.step(lambda: loss_of(model)().item())
    assert torch.equal(weights(model), before)
    assert opt.step_count == 0


@pytest.mark.filterwarnings("ignore")  # of transformers, about its own models
def test_paired_names_what_helps_a_mixture_of_experts():
    pytest.importorskip("transformers")
    from support import tiny_models

    model = tiny_models.causal_model("qwen3_moe")
    x = torch.randint(7, 100, (2, 5), generator=torch.Generator().manual_seed(0))
    optimizer = zo_fused.LOZO(model, lr=1e-6, mode="factored", paired=True)
    model.set_experts_implementation("eager")
    with pytest.raises(
        RuntimeError, match=r"paired=True .*use experts_implementation='batched_mm'"
    ):
        optimizer.step(lambda: model(input_ids=x, labels=x).loss)
    model.set_experts_implementation("batched_mm")
    assert torch.isfinite(optimizer.step(lambda: model(input_ids=x, labels=x).loss))
