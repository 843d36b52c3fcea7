"""QZO against its paper: scales move, by clipped estimates; all else stays."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.models import same
from support.quantized import INPUT, loss_of, quantized_network
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing._internal.two_tensor import TwoTensor

import zo_fused
from zo_fused.noise import Purpose, derive_key, normal, parameter_id
from zo_fused.step.rule import Update

SEED, STEPS, EPS, LR, DECAY = 11, 50, 1e-4, 3e-6, 0.5
CLIP, FLOOR = 60.0, 2e-3
NAMES = ["0.scales", "3.scales"]
MODEL = quantized_network().double()


def z_of(name: str, scale: Tensor, step: int, query: int) -> Tensor:
    key = derive_key(SEED, Purpose.DENSE, step, query)
    return normal(scale.numel(), key, parameter_id(name)).double().view(scale.shape)


def float64_loss(scales: dict[str, Tensor]) -> float:
    """The loss as a function of the scales: its rounding plays no part."""
    return float(functional_call(MODEL, scales, (INPUT.double(),)).detach().square().mean())


def doubles(model: nn.Module) -> dict[str, Tensor]:
    scales = {name: b for name, b in model.named_buffers() if name in NAMES}
    return {name: scale.double().clone() for name, scale in scales.items()}


def paper(theta: dict[str, Tensor], queries: int, one_sided: bool) -> tuple[list[float], int]:
    """Moves theta; returns the clipped d, and how often the floor was met."""
    told, floored = [], 0
    for step in range(STEPS):
        update = {name: torch.zeros_like(scale) for name, scale in theta.items()}
        for query in range(queries):
            z = {name: z_of(name, scale, step, query) for name, scale in theta.items()}
            plus = float64_loss({name: s + EPS * z[name] for name, s in theta.items()})
            away = 0.0 if one_sided else -EPS
            minus = float64_loss({name: s + away * z[name] for name, s in theta.items()})
            d = (plus - minus) / (EPS - away)
            told.append(min(max(d, -CLIP), CLIP))
            for name in theta:
                update[name] += told[-1] * z[name] / queries
        for name, scale in theta.items():
            moved = scale - LR * (update[name] + DECAY * scale)
            floored += int((moved < FLOOR).sum())
            theta[name] = moved.clamp(min=FLOOR)
    return told, floored


@pytest.mark.parametrize("kw", [{}, {"queries": 2}, {"queries": 2, "one_sided": True}], ids=str)
def test_qzo_follows_its_paper(kw: dict[str, Any]) -> None:
    """Tolerances: a scale below 2^-8 is rounded to 2^-33 in each of 3 sweeps, so losses are taken
    2^-31 off their places at the most, and a slope of at most 100 along z is off by 100 * 2^-31 /
    eps = 5e-4. A step moves that far by lr |z| 5e-4, all of them by 50 * 3e-6 * 4 * 5e-4 < 4e-7;
    they add up like a random walk, and there is the rounding of 150 sweeps, 2^-33 * 12."""
    model = quantized_network()
    theta = doubles(model)
    start = {name: scale.clone() for name, scale in theta.items()}
    expected, floored = paper(theta, kw.get("queries", 1), kw.get("one_sided", False))
    opt = zo_fused.QZO(
        model, lr=LR, clip=CLIP, floor=FLOOR, eps=EPS, seed=SEED, weight_decay=DECAY, **kw
    )
    told: list[float] = []
    for _ in range(STEPS):
        opt.step(lambda: float64_loss(doubles(model)))
        assert opt.projected_grad is not None
        told += opt.projected_grad.reshape(-1).tolist()
    torch.testing.assert_close(torch.tensor(told), torch.tensor(expected), rtol=0, atol=1e-3)
    clipped = sum(abs(d) == CLIP for d in expected)
    assert len(expected) / 10 < clipped < len(expected) * 9 / 10, clipped
    assert floored > 10
    for name, scale in doubles(model).items():
        torch.testing.assert_close(scale, theta[name], rtol=0, atol=1e-7)
        assert float((scale - start[name]).abs().max()) > 1e-4


# ---- what clipping does --------------------------------------------------------------------------


def test_clipping_shortens_the_mean_estimate_and_does_not_turn_it() -> None:
    """Of a straight loss, g = <a, z>, and E[clamp(g, -|a|, |a|) z] = P(|N(0, 1)| <= 1) a. The mean
    of 2000 has a standard deviation of at most |a| / sqrt(2000) = 0.03 in each element."""
    a = torch.tensor([0.6, -0.6, 0.4, 0.2, 0.2, -0.2], dtype=torch.float64)
    a /= a.norm()
    theta = nn.Parameter(torch.zeros(6))
    opt = zo_fused.QZO([("s", theta)], lr=1.0, clip=1.0, floor=None, eps=1e-2, queries=2000)
    opt.step(lambda: float(a @ theta.detach().double()))
    torch.testing.assert_close(-theta.detach().double(), 0.6827 * a, rtol=0, atol=0.1)
    assert opt.projected_grad is not None
    assert 0.2 < float((opt.projected_grad.abs() == 1).float().mean()) < 0.45  # theory: 0.317


def test_without_a_clip_it_is_mezo() -> None:
    models = [quantized_network(), quantized_network()]
    scales = [zo_fused.quantization_scales(model) for model in models]
    kw: dict[str, Any] = {"lr": 1e-7, "eps": EPS, "queries": 2}
    qzo = zo_fused.QZO(models[0], clip=None, floor=None, **kw)
    mezo = zo_fused.MeZO([(name, s.requires_grad_()) for name, s in scales[1]], **kw)
    for _ in range(3):
        qzo.step(lambda: loss_of(models[0]))
        mezo.step(lambda: loss_of(models[1]))
    assert same(*models)


def test_a_slope_that_is_not_finite_is_no_clipped_one() -> None:
    model = quantized_network()
    opt = zo_fused.QZO(model, eps=EPS, floor=1.0)  # which would raise all scales
    opt.step(lambda: float("inf"))
    assert opt.skipped_steps == 1
    for name, scale in doubles(model).items():
        torch.testing.assert_close(scale, doubles(quantized_network())[name], rtol=0, atol=2**-31)


@pytest.mark.parametrize("skipped", [False, True])
def test_on_a_device_a_skipped_step_has_no_floor(skipped: bool) -> None:
    """There the host does not know whether it is one."""
    model = quantized_network()
    opt = zo_fused.QZO(model, lr=1e-12, eps=EPS, floor=2e-3)
    known = opt.rule.apply

    def apply(update: Update, *rest: Any) -> None:
        known(replace(update, skipped=torch.tensor(skipped)), *rest)

    opt.rule.apply = apply  # type: ignore[method-assign]
    opt.step(lambda: loss_of(model))
    smallest = float(model[0].scales.min())
    assert (smallest < 1e-3) if skipped else (smallest == float(torch.tensor(2e-3)))


# ---- what moves ----------------------------------------------------------------------------------


def test_scales_alone_move_and_the_model_stays_what_it_is() -> None:
    model, base = quantized_network(), quantized_network()
    held = [model[0].scales, model[3].scales]
    opt = zo_fused.QZO(model, lr=1e-6, eps=EPS)
    assert opt.param_groups[0]["param_names"] == NAMES
    for _ in range(2):
        opt.step(lambda: loss_of(model))
    assert [model[0].scales, model[3].scales] == held
    assert [type(s) for s in held] == [Tensor, Tensor]
    assert not any(s.requires_grad for s in held)
    before = base.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in NAMES), name


def test_what_is_not_quantized_moves_if_it_is_given() -> None:
    model, base = quantized_network(), quantized_network()
    biases = [(f"{i}.bias", model[i].bias) for i in (0, 3)]
    biases[1][1].requires_grad_(False)
    scales = zo_fused.quantization_scales(model)
    groups = [{"params": scales}, {"params": biases, "lr": 1e-3, "eps": 1e-2}]
    opt = zo_fused.QZO(groups, lr=1e-6, eps=EPS, floor=None)
    opt.step(lambda: loss_of(model))
    before = base.state_dict()
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == {*NAMES, "0.bias"}


def module_with(**tensors: Tensor) -> nn.Module:
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    return module


CODES = torch.zeros(4, 6, dtype=torch.int32)


@pytest.mark.parametrize(
    ("module", "found"),
    [
        (module_with(qweight=CODES, qzeros=CODES, scales=torch.ones(2, 6).half()), ["scales"]),
        (
            module_with(codes=CODES.short(), codebooks=torch.ones(9), scales=torch.ones(4)),
            ["scales"],
        ),
        (module_with(weight=CODES.char(), weight_scale=torch.ones(4, 1)), ["weight_scale"]),
        (module_with(weight=torch.ones(4).to(torch.float8_e4m3fn), scale=torch.ones(1)), ["scale"]),
        (module_with(mask=torch.ones(9, dtype=torch.bool), scale=torch.ones(4)), []),
        (module_with(scale=torch.ones(1), zero_point=CODES[0, :1], enabled=CODES[0, :1]), []),
        (module_with(scale=torch.ones(6), bias=torch.ones(6)), []),  # a norm
        (module_with(weight=CODES), []),
    ],
    ids=["GPTQ", "AQLM", "int8", "float8", "mask", "fake quantization", "norm", "none"],
)
def test_scales_are_found_beside_codes(module: nn.Module, found: list[str]) -> None:
    assert [name for name, _ in zo_fused.quantization_scales(module)] == found
    whole = nn.ModuleDict({"a": module, "b": module, "c": nn.Linear(2, 2)})
    assert [name for name, _ in zo_fused.quantization_scales(whole)] == [f"a.{n}" for n in found]


# ---- what is refused -----------------------------------------------------------------------------


def four_bits(nested: bool = False, packs: bool = False, packed: bool = False) -> nn.Module:
    """As bitsandbytes has them."""
    module = module_with(weight=CODES.byte())
    state = SimpleNamespace(nested=nested, absmax=torch.ones(4), packing_format_for_cpu=packed)
    module.weight.quant_state = state
    module.support_avx512bf16_for_cpu = packs  # type: ignore[assignment]
    return module


def eight_bits(scale: Tensor | None) -> nn.Module:
    module = module_with(weight=CODES.char())
    module.weight.SCB = scale
    return module


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (nn.Linear(2, 2), "the model has no quantized layer"),
        (module_with(codes=CODES, scales=torch.ones(4).double()), "a.scales has dtype float64"),
        (
            module_with(codes=CODES, scales=torch.ones(1).expand(4)),
            "'a.scales' is a view with gaps",
        ),
        (
            module_with(codes=CODES, scales=torch.ones(4, device="meta")),
            "'a.scales' is on the meta",
        ),
        (module_with(codes=CODES, scales=-torch.ones(4)), "'a.scales' has negative elements"),
        (
            module_with(codes=CODES, scales=torch.full((4,), 2e-3)),
            "eps=0.001 is too large .* as 0.0001",
        ),
        (four_bits(nested=True), "a: its absmax is quantized, too: .*use_double_quant=False"),
        (four_bits(packs=True), "a: on this CPU, bitsandbytes packs absmax anew"),
        (four_bits(packed=True), "a: on this CPU, bitsandbytes packs absmax anew"),
        (eight_bits(None), "a.SCB: the layer is quantized and holds no scale"),
        (module_with(w=TwoTensor(torch.ones(4), torch.ones(4))), "a.w is a TwoTensor, .* but a, b"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_scales_that_cannot_be_moved_are_refused_by_name(module: nn.Module, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        zo_fused.QZO(nn.ModuleDict({"a": module}))


@pytest.mark.parametrize(
    ("module", "name"),
    [(four_bits(), "weight.absmax"), (eight_bits(torch.ones(4)), "SCB")],
)
def test_scales_of_bitsandbytes_have_the_names_of_its_state_dicts(
    module: nn.Module, name: str
) -> None:
    opt = zo_fused.QZO(module)
    assert opt.param_groups[0]["param_names"] == [name]


@pytest.mark.parametrize(
    ("kw", "why"),
    [
        ({"clip": 0.0}, "clip must be a number > 0"),
        ({"clip": float("nan")}, "clip must be a number > 0"),
        ({"floor": -1.0}, "floor must be a finite number >= 0"),
    ],
)
def test_bad_numbers_are_refused(kw: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        zo_fused.QZO(quantized_network(), eps=EPS, **kw)


def test_deferred_is_no_option() -> None:
    with pytest.raises(TypeError, match="deferred"):
        zo_fused.QZO(quantized_network(), eps=EPS, deferred=True)  # type: ignore[call-arg]


@pytest.mark.parametrize("how", ["assigned", "cast", "unquantized", "replaced", "taken out"])
def test_a_model_with_other_scales_is_noticed(how: str) -> None:
    model = quantized_network()
    opt = zo_fused.QZO(model, eps=EPS)
    opt.step(lambda: loss_of(model))
    if how == "assigned":
        model[3].scales = model[3].scales * 2
    elif how == "cast":
        model[3].half()
    elif how == "unquantized":
        del model[3].scales
    elif how == "replaced":
        model[3] = copy.deepcopy(model[3])
    else:
        model[3] = nn.Linear(12, 4)
    with pytest.raises(RuntimeError, match=r"another tensor for 3.scales than when"):
        opt.step(lambda: loss_of(model))


def test_eps_is_checked_for_scales_in_groups() -> None:
    scales = [p for _, p in zo_fused.quantization_scales(quantized_network())]
    with pytest.raises(ValueError, match=r"eps=0\.01 is too large"):
        zo_fused.QZO([{"params": scales}], eps=1e-2)


@pytest.mark.parametrize("how", ["set", "loaded", "added"])
def test_eps_is_checked_whenever_it_comes(how: str) -> None:
    """The scales are about 3e-3."""
    model = quantized_network()
    opt = zo_fused.QZO(model, eps=EPS)
    opt.step(lambda: loss_of(model))
    before = doubles(model)

    def change() -> None:
        if how == "added":
            scales = [("more.scales", quantized_network()[0].scales)]
            opt.add_param_group({"params": scales, "eps": 1e-2})
            return
        if how == "set":
            opt.param_groups[0]["eps"] = 1e-2
        else:
            state = opt.state_dict()
            state["param_groups"][0]["eps"] = 1e-2
            opt.load_state_dict(state)
        opt.step(lambda: loss_of(model))

    with pytest.raises(ValueError, match=r"eps=0.01 is too large .*: theta \+ eps z would have"):
        change()
    for name, scale in doubles(model).items():
        torch.testing.assert_close(scale, before[name], rtol=0, atol=2**-31)
    opt.param_groups[0]["eps"] = EPS / 2
    opt.step(lambda: loss_of(model))


def test_a_floor_is_checked_for_what_is_added() -> None:
    opt = zo_fused.QZO(quantized_network(), eps=EPS)
    biases = quantized_network()[0].bias
    with pytest.raises(ValueError, match=r"'0.bias' has negative elements, which floor would"):
        opt.add_param_group({"params": [("0.bias", biases)], "eps": 1e-2})
    assert len(opt.param_groups) == 1


def test_scales_that_are_loaded_in_place_are_the_same() -> None:
    model = quantized_network()
    opt = zo_fused.QZO(model, eps=EPS)
    model.load_state_dict({n: t * 2 if n in NAMES else t for n, t in model.state_dict().items()})
    opt.step(lambda: loss_of(model))
    twice = 2 * quantized_network()[0].scales  # a step goes lr clip |z| < 1e-4
    torch.testing.assert_close(model[0].scales, twice, rtol=0, atol=1e-4)


def test_a_copy_would_belong_to_no_model() -> None:
    model = quantized_network()
    opt = zo_fused.QZO(model, eps=EPS)
    with pytest.raises(TypeError, match="can't be copied or pickled"):
        copy.deepcopy((model, opt))
    of_tensors = zo_fused.QZO(zo_fused.quantization_scales(model), eps=EPS)
    copy.deepcopy(of_tensors).flush()


# ---- between the halves, replay, resume ----------------------------------------------------------


def test_between_estimate_and_step_the_layers_have_theta() -> None:
    """No guard is in the way of a layer that reads its scale."""
    models = [quantized_network(), quantized_network()]
    opts = [zo_fused.QZO(model, lr=1e-6, eps=EPS) for model in models]
    for _ in range(2):
        before = doubles(models[0])
        opts[0].estimate(lambda: loss_of(models[0]))
        for name, scale in doubles(models[0]).items():  # up to the rounding of sweeps
            torch.testing.assert_close(scale, before[name], rtol=0, atol=2**-31)
        opts[0].step()
        opts[1].step(lambda: loss_of(models[1]))
    for name, scale in doubles(models[1]).items():
        torch.testing.assert_close(scale, doubles(models[0])[name], rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_log_and_a_newly_quantized_base_give_the_scales(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """With clips, a floor that is met, a skipped step, two halves of a step and a resumed run."""
    log = tmp_path / "log"

    def made(model: nn.Module) -> zo_fused.QZO:
        kw: dict[str, Any] = {"lr": 1e-5, "clip": 30.0, "floor": 2e-3, "weight_decay": 0.1}
        return zo_fused.QZO(model, eps=EPS, seed=3, rounding="stochastic", **kw)

    model = quantized_network(dtype)
    opt = made(model)
    opt.start_log(log)
    for step in range(4):
        opt.step(lambda step=step: float("nan") if step == 1 else loss_of(model))
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict())

    def goes_on(opt: zo_fused.QZO, model: nn.Module) -> None:
        opt.estimate(lambda: loss_of(model))
        opt.step()
        opt.step(lambda: loss_of(model))

    goes_on(opt, model)
    opt.close_log()
    again = quantized_network(dtype)
    again.load_state_dict(weights)
    other = made(again)
    other.load_state_dict(state)
    other.start_log(log, resume=True)
    goes_on(other, again)
    assert same(model, again)
    base = quantized_network(dtype)
    assert not same(model, base)
    assert float(model[0].scales.min()) == float(torch.tensor(2e-3, dtype=dtype))
    assert zo_fused.replay(base, log) == 6
    assert same(model, base)
    tensors = dict(zo_fused.quantization_scales(quantized_network(dtype)))
    zo_fused.replay(tensors, log)
    assert all(torch.equal(tensors[name], model.state_dict()[name]) for name in NAMES)
