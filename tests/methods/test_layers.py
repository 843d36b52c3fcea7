"""Layers of models: found where transformers, PEFT and plain modules keep them."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from support.families import MODELS, OPT_SMALL, make
from support.textbook import SmallTransformer
from torch import nn

import zo_fused


def names(group: dict[str, Any]) -> list[str]:
    return [name for name, _ in group["params"]]


def check_every_parameter_once(model: nn.Module, groups: list[dict[str, Any]]) -> None:
    params = [pair for group in groups for pair in group["params"]]
    assert len(params) == len({id(p) for _, p in params})
    assert {name: id(p) for name, p in params} == {n: id(p) for n, p in model.named_parameters()}
    assert [group["block"] for group in groups] == list(range(len(groups)))
    assert all(group["params"] for group in groups)


@pytest.mark.parametrize("name", list(MODELS))
def test_layers_of_transformers(name: str) -> None:
    model = make(name)
    prefix, before, after = MODELS[name][3:]
    groups = zo_fused.layer_blocks(model)
    check_every_parameter_once(model, groups)
    assert len(groups) == 5
    assert before in names(groups[0])
    assert after in names(groups[4])
    for i in range(3):
        assert all(n.startswith(f"{prefix}{i}.") for n in names(groups[1 + i]))
    for k in range(4):
        first, rest = zo_fused.first_layers(model, k)
        assert [n for n, _ in first] == [n for group in groups[: k + 1] for n in names(group)]
        assert [n for n, _ in rest] == [n for group in groups[k + 1 :] for n in names(group)]


def test_what_opt_runs_last_is_last() -> None:
    """OPT declares its final norm and projection before the layers."""
    last = names(zo_fused.layer_blocks(make("OPT"))[-1])
    assert [n.removeprefix("model.decoder.") for n in last] == [
        "project_out.weight",
        "final_layer_norm.weight",
        "final_layer_norm.bias",
    ]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about what peft calls
@pytest.mark.parametrize("name", ["OPT", "Llama"])
def test_layers_under_peft(name: str) -> None:
    peft = pytest.importorskip("peft")
    plain = make(name)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2)
    model = peft.get_peft_model(plain, config)
    groups = zo_fused.layer_blocks(model)
    check_every_parameter_once(model, groups)
    assert len(groups) == 5
    for i in range(3):
        layer = names(groups[1 + i])
        assert all(f".layers.{i}." in n for n in layer)
        assert sum("lora_" in n for n in layer) == 4


def test_tied_parameters_are_where_they_appear_first() -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.OPTForCausalLM(transformers.OPTConfig(**OPT_SMALL))
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    groups = zo_fused.layer_blocks(model)
    check_every_parameter_once(model, groups)
    first, rest = zo_fused.first_layers(model, 0)
    assert any(p is model.lm_head.weight for _, p in first)
    assert not any(p is model.lm_head.weight for _, p in rest)


def test_all_parameters_whether_or_not_they_require_gradients() -> None:
    model = SmallTransformer().requires_grad_(False)
    check_every_parameter_once(model, zo_fused.layer_blocks(model))


def test_optimizers_take_the_groups() -> None:
    torch.manual_seed(0)
    model, tokens = SmallTransformer(), torch.randint(0, 31, (2, 8))
    groups = zo_fused.layer_blocks(model)
    assert len(groups) == 3  # the head is tied to the embedding
    opt = zo_fused.MeZO(groups, lr=1e-4)
    assert [group["block"] for group in opt.param_groups] == [0, 1, 2]
    assert torch.isfinite(opt.step(lambda: model(tokens)))


# ---- plain modules ------------------------------------------------------------------------------


def test_plain_modules() -> None:
    """A Sequential; in a longer path, beside a longer list of modules without parameters."""
    sequential = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    assert len(zo_fused.layer_blocks(sequential)) == 4  # nothing before, nothing after
    relus = nn.ModuleList(nn.ReLU() for _ in range(9))
    model = nn.ModuleDict({"relus": relus, "embed": nn.Embedding(3, 3), "body": sequential})
    groups = zo_fused.layer_blocks(model)
    assert [names(g)[0] for g in groups] == [
        "embed.weight",
        *(f"body.{i}.weight" for i in range(4)),
    ]
    assert len(zo_fused.layer_blocks(nn.Sequential(model))) == 5


def test_lists_inside_a_layer_are_no_layers() -> None:
    """Experts: more in each layer than there are layers."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(8))

    model = nn.Module()
    model.layers = nn.ModuleList(Layer() for _ in range(3))
    assert [len(g["params"]) for g in zo_fused.layer_blocks(model)] == [16, 16, 16]


def test_a_layer_that_shares_all_its_parameters_is_no_block() -> None:
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    model = nn.Module()
    model.layers = nn.ModuleList([one, one, two])
    groups = zo_fused.layer_blocks(model)
    check_every_parameter_once(model, groups)
    assert len(groups) == 2


def test_more_than_nine_layers_keep_their_order() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(12)))
    groups = zo_fused.layer_blocks(model)
    assert [names(g) for g in groups] == [[f"{i}.weight"] for i in range(12)]
    assert [n for n, _ in zo_fused.first_layers(model, 2)[0]] == ["0.weight", "1.weight"]


# ---- patterns and errors ------------------------------------------------------------------------


def test_patterns_in_order_of_precedence() -> None:
    model = SmallTransformer()
    groups = zo_fused.layer_blocks(model, [r"norm\d", r"^blocks\.1\.", r"nothing", r""])
    check_every_parameter_once(model, groups)
    assert len(groups) == 3  # a pattern that takes nothing makes no block
    assert all("norm" in n for n in names(groups[0]))
    assert len(names(groups[0])) == 8
    assert all(n.startswith("blocks.1.") and "norm" not in n for n in names(groups[1]))
    assert "embed.weight" in names(groups[2])


def test_a_parameter_that_no_pattern_matches_is_named() -> None:
    with pytest.raises(ValueError, match=r"no pattern matches parameter 'embed\.weight'"):
        zo_fused.layer_blocks(SmallTransformer(), [r"blocks"])


def test_no_layers_and_several_are_errors_that_say_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"no list of layers was found in Linear; give patterns"):
        zo_fused.layer_blocks(nn.Linear(2, 2))
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no list of layers"):
        zo_fused.first_layers(mixed, 1)
    both = nn.ModuleDict({name: SmallTransformer().blocks for name in ("encoder", "decoder")})
    with pytest.raises(ValueError, match=r"several lists of 2 layers .*encoder, decoder.*patterns"):
        zo_fused.layer_blocks(both)
    assert len(zo_fused.layer_blocks(both, ["^enc", "^dec"])) == 2


@pytest.mark.parametrize("k", [-1, 3])
def test_first_layers_out_of_range(k: int) -> None:
    with pytest.raises(ValueError, match=r"k must lie in \[0, 2\]"):
        zo_fused.first_layers(SmallTransformer(), k)


def test_layers_with_names_of_their_own() -> None:
    layers = OrderedDict(a=nn.Linear(2, 2), b=nn.Linear(2, 2))
    blocks = zo_fused.layer_blocks(nn.Sequential(layers))
    assert [[name for name, _ in block["params"]] for block in blocks] == [
        ["a.weight", "a.bias"],
        ["b.weight", "b.bias"],
    ]
