"""QZO over layers of torchao and bitsandbytes, where these are installed (no extra has them)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zo_fused

INPUT = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
pytestmark = pytest.mark.filterwarnings("default")  # theirs

Made = Callable[[], nn.Sequential]


def plain(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32)).to(dtype).eval()


def by_torchao(config: str) -> nn.Sequential:
    quantization = pytest.importorskip("torchao.quantization")
    model = plain(torch.bfloat16)
    quantization.quantize_(model, getattr(quantization, config)())
    return model


def by_bitsandbytes(bits: int) -> nn.Sequential:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for layer in plain(torch.float32):
        if isinstance(layer, nn.Linear):
            shape = (layer.in_features, layer.out_features)
            if bits == 4:
                made = bnb.nn.Linear4bit(*shape, compress_statistics=False, quant_type="nf4")
                made.support_avx512bf16_for_cpu = False
            else:
                made = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False)
            made.load_state_dict(layer.state_dict())
            layer = made
        layers.append(layer)
    return nn.Sequential(*layers).to("cpu").eval()


def loss_of(model: nn.Sequential) -> Tensor:
    bias = model[0].bias
    assert isinstance(bias, Tensor)
    return model(INPUT.to(bias.dtype)).float().square().mean()


MODELS: dict[str, tuple[Made, list[str], dict[str, Any]]] = {
    "int8": (
        lambda: by_torchao("Int8WeightOnlyConfig"),
        ["0.weight.scale", "2.weight.scale"],
        {"eps": 1e-5, "lr": 1e-8},
    ),
    "int8, activations": (
        lambda: by_torchao("Int8DynamicActivationInt8WeightConfig"),
        ["0.weight.scale", "2.weight.scale"],
        {"eps": 1e-5, "lr": 1e-8},
    ),
    "intx": (
        lambda: by_torchao("IntxWeightOnlyConfig"),
        ["0.weight.scale", "2.weight.scale"],
        {"eps": 1e-5, "lr": 1e-7},
    ),
    "float8": (
        lambda: by_torchao("Float8WeightOnlyConfig"),
        ["0.weight.scale", "2.weight.scale"],
        {"eps": 1e-5, "lr": 1e-8},
    ),
    "nf4": (
        lambda: by_bitsandbytes(4),
        ["0.weight.absmax", "2.weight.absmax"],
        {"eps": 1e-3, "lr": 1e-4},
    ),
    "LLM.int8": (lambda: by_bitsandbytes(8), ["0.SCB", "2.SCB"], {"eps": 1e-3, "lr": 1e-4}),
}


def flat(state: dict[str, Any]) -> dict[str, Tensor]:
    from zo_fused.cli.replay import _plain

    return {name: t.clone() for name, t in _plain({k: v.detach() for k, v in state.items()})}


@pytest.mark.parametrize("name", MODELS)
def test_a_quantized_model_learns_and_replays(name: str, tmp_path: Path) -> None:
    make, names, kw = MODELS[name]
    model, log = make(), tmp_path / "log"
    base = flat(model.state_dict())
    opt = zo_fused.QZO(model, seed=3, **kw)
    assert opt.param_groups[0]["param_names"] == names
    with torch.no_grad():
        first = float(loss_of(model))
    opt.start_log(log)
    for _ in range(40):
        opt.step(lambda: loss_of(model))
    opt.close_log()
    with torch.no_grad():
        assert float(loss_of(model)) < first
    tuned = flat(model.state_dict())
    assert {n for n in base if not torch.equal(base[n], tuned[n])} == set(names)
    again = make()
    zo_fused.replay(again, log)
    replayed = flat(again.state_dict())
    assert all(torch.equal(replayed[n], tuned[n]) for n in base)


def test_layers_of_torchao_are_copied_with_their_scales() -> None:
    model = MODELS["int8"][0]()
    opt = zo_fused.QZO(model, **MODELS["int8"][2])
    opt.step(lambda: loss_of(model))
    other = copy.deepcopy(model)
    mine = zo_fused.QZO(other, **MODELS["int8"][2])
    mine.load_state_dict(opt.state_dict())
    for each, tuned in ((opt, model), (mine, other)):
        each.step(lambda tuned=tuned: loss_of(tuned))
    one, two = flat(model.state_dict()), flat(other.state_dict())
    assert all(torch.equal(one[n], two[n]) for n in one)


def test_double_quantization_is_refused() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 32, compress_statistics=True)
    with pytest.raises(ValueError, match="Linear4bit: its absmax is quantized, too"):
        zo_fused.QZO(layer.to("cpu"))
