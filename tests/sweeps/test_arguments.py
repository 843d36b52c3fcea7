"""Arguments are what they seem: numbers of other libraries, switches, groups, names, memory.

Everything is converted, or refused by its name before anything moves.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import zo_fused
from zo_fused import noise
from zo_fused.noise import Purpose, derive_key
from zo_fused.noise.streams import plain_name


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


INPUT = torch.randn(10, 6, generator=torch.Generator().manual_seed(1))


def loss_of(model: nn.Module) -> Callable[[], Tensor]:
    return lambda: model(INPUT).square().mean()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


METHODS: dict[str, Callable[..., Any]] = {
    "MeZO": zo_fused.MeZO,
    "MeZO-M deferred": lambda m, **kw: zo_fused.MeZO(m, momentum=0.9, deferred=True, **kw),
    "LOZO": zo_fused.LOZO,
    "LOZO-M": lambda m, **kw: zo_fused.LOZO(m, momentum=0.9, **kw),
    "LOZO factored": lambda m, **kw: zo_fused.LOZO(m, mode="factored", **kw),
    "ZOAdam": zo_fused.ZOAdam,
    "ZOSignSGD": zo_fused.ZOSignSGD,
    "ZOConservative": zo_fused.ZOConservative,
    "ForwardGrad": zo_fused.ForwardGrad,
}
# torch's own, of forward-mode derivatives
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


# ---- numbers ------------------------------------------------------------------------------------

EIGHTH = [
    np.float32(0.125),
    np.float64(0.125),
    np.array(0.125, np.float16),
    Decimal("0.125"),
    Fraction(1, 8),
    torch.tensor(0.125),
]


@pytest.mark.parametrize("value", EIGHTH, ids=lambda value: type(value).__name__)
def test_numbers_of_other_libraries(value: Any) -> None:
    """At construction, in a group, and set later: kept as Python's own, so that states and logs can
    be written. A tensor stays as lr only."""
    wanted, model = network(), network()
    plain = zo_fused.ZOAdam(wanted, lr=0.125, eps=0.125, betas=(0.125, 0.125), weight_decay=0.125)
    groups = [{"params": list(model.named_parameters()), "weight_decay": value}]
    opt = zo_fused.ZOAdam(groups, lr=value, eps=value, betas=(value, value))
    for step in range(3):
        if step == 1:
            for name in ("lr", "eps", "weight_decay"):
                opt.param_groups[0][name] = value
            opt.param_groups[0]["betas"] = [value, value]
        plain.step(loss_of(wanted))
        opt.step(loss_of(model))
        group = opt.param_groups[0]
        kept = [group["eps"], group["weight_decay"], *group["betas"]]
        kept += [] if isinstance(value, Tensor) else [group["lr"]]
        assert [type(x) for x in kept] == [float] * len(kept)
    assert same(weights(model), weights(wanted))
    json.dumps({name: x for name, x in opt.defaults.items() if name != "lr"})


@pytest.mark.parametrize("value", [np.int64(2), np.array(2), torch.tensor(2)])
def test_whole_numbers_of_other_libraries(value: Any, tmp_path: Path) -> None:
    model, base = network(), network()
    opt = zo_fused.LOZO(model, rank=value, interval=value, queries=value, seed=value, lr=1e-2)
    opt.start_log(tmp_path / "log.jsonl")  # JSON knows Python's numbers only
    opt.step(loss_of(model))
    zo_fused.replay(base, tmp_path / "log.jsonl")
    assert same(weights(base), weights(model))
    forward = zo_fused.ForwardGrad(network(), queries=value)
    forward.start_log(tmp_path / "forward.jsonl")
    assert zo_fused.ZOAdam(network(), history=value).rule.history == 2  # type: ignore[attr-defined]


REFUSED: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("MeZO", {"lr": "1e-3"}, TypeError, "lr must be a number, got '1e-3'"),
    ("MeZO", {"lr": None}, TypeError, "lr must be a number, got None"),
    ("MeZO", {"lr": True}, TypeError, "lr must be a number, got True"),
    ("MeZO", {"lr": 1j}, TypeError, "lr must be a number, got 1j"),
    ("MeZO", {"lr": torch.ones(2)}, TypeError, "lr must be one number, got a tensor (2,)"),
    ("MeZO", {"lr": np.ones(1)}, TypeError, "lr must be one number, got an array (1,)"),
    ("MeZO", {"lr": torch.ones((), device="meta")}, TypeError, "on the meta device"),
    ("MeZO", {"lr": torch.tensor(math.nan)}, ValueError, "lr must be a finite number >= 0"),
    ("MeZO", {"lr": 1e39}, ValueError, "lr must be a finite number >= 0, got 1e+39"),
    ("MeZO", {"lr": 10**400}, ValueError, "lr must be a finite number >= 0"),
    ("MeZO", {"lr": Decimal("sNaN")}, ValueError, "lr must be a finite number >= 0"),
    ("MeZO", {"eps": "1e-3"}, TypeError, "eps must be a number, got '1e-3'"),
    ("MeZO", {"eps": 1e-39}, ValueError, "underflow in float32 (at least 1.18e-38), got 1e-39"),
    ("MeZO", {"eps": math.inf}, ValueError, "eps must be a finite number > 0"),
    ("MeZO", {"weight_decay": "0"}, TypeError, "weight_decay must be a number"),
    ("ZOMuon", {"vector_lr": -1}, ValueError, "vector_lr must be a finite number >= 0, got -1"),
    ("PGAP", {"delta": None, "vector_eps": 0}, ValueError, "vector_eps must be a finite number >"),
    ("MeZO", {"momentum": "0.9"}, TypeError, "momentum must be a number"),
    ("MeZO", {"momentum": math.nan}, ValueError, "momentum must be a number in [0, 1), got nan"),
    ("MeZO", {"dampening": 1}, ValueError, "dampening must be a number in [0, 1)"),
    ("MeZO", {"state_dtype": torch.float32}, ValueError, "state_dtype must be one of"),
    ("MeZO", {"rounding": None}, ValueError, "rounding must be one of"),
    ("MeZO", {"deferred": 1}, TypeError, "deferred must be True or False, got 1"),
    ("MeZO", {"one_sided": "no"}, TypeError, "one_sided must be True or False, got 'no'"),
    ("MeZO", {"queries": 2.0}, ValueError, "queries must be a whole number in [1, 2**32), got 2.0"),
    (
        "MeZO",
        {"queries": True},
        ValueError,
        "queries must be a whole number in [1, 2**32), got True",
    ),
    ("MeZO", {"distribution": "normal"}, ValueError, "distribution must be one of ('gaussian'"),
    ("MeZO", {"distribution": ["gaussian"]}, ValueError, "distribution must be one of"),
    ("MeZO", {"block_order": "random"}, ValueError, "block_order must be one of"),
    ("MeZO", {"seed": None}, ValueError, "seed must be a whole number in [0, 2**64), got None"),
    ("MeZO", {"seed": 1.5}, ValueError, "seed must be a whole number in [0, 2**64), got 1.5"),
    ("MeZO", {"seed": 1 << 64}, ValueError, "seed must be a whole number in [0, 2**64)"),
    ("LOZO", {"rank": "2"}, ValueError, "rank must be a whole number in [1, 2**31), got '2'"),
    (
        "LOZO",
        {"interval": 50.0},
        ValueError,
        "interval must be a whole number in [1, 2**63), got 50.0",
    ),
    ("LOZO", {"divide_by_rank": 1}, TypeError, "divide_by_rank must be True or False"),
    ("LOZO", {"paired": "no"}, TypeError, "paired must be True or False"),
    ("LOZO", {"mode": None}, ValueError, "mode must be one of ('inplace', 'factored')"),
    ("ZOAdam", {"betas": 0.9}, ValueError, "betas must be two numbers in [0, 1), got 0.9"),
    ("ZOAdam", {"betas": (0.9, 0.99, 0.999)}, ValueError, "betas must be two numbers"),
    ("ZOAdam", {"betas": (0.9, "0.999")}, TypeError, "betas[1] must be a number, got '0.999'"),
    ("ZOAdam", {"adam_eps": 1e-46}, ValueError, "adam_eps must be a finite number > 0"),
    ("ZOAdam", {"history": 2.0}, ValueError, "history must be a whole number >= 1, got 2.0"),
    ("ZOSignSGD", {"sign": True}, ValueError, "sign must be one of ('element', 'scalar')"),
]


@pytest.mark.parametrize(
    ("method", "arguments", "error", "message"), REFUSED, ids=[str(case[1]) for case in REFUSED]
)
def test_refused_by_name(
    method: str, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        getattr(zo_fused, method)(network(), **arguments)


@pytest.mark.parametrize(
    ("name", "bad", "error"),
    [
        ("lr", math.nan, ValueError),
        ("lr", -1e-3, ValueError),
        ("lr", "1e-3", TypeError),
        ("lr", torch.tensor(math.inf), ValueError),
        ("eps", math.nan, ValueError),
        ("eps", 0.0, ValueError),
        ("weight_decay", math.inf, ValueError),
        ("momentum", 1.0, ValueError),
        ("betas", (0.9, math.nan), ValueError),
        ("rank", 2.5, ValueError),
        ("rounding", "up", ValueError),
    ],
)
@pytest.mark.parametrize("method", list(METHODS))
def test_a_bad_value_between_steps(
    method: str, name: str, bad: Any, error: type[Exception]
) -> None:
    """Refused by the step that meets it, as if it had not been called; once it is mended, the run
    goes on. A flush of a deferred or factored run rounds, so the twin is flushed as well."""
    model, twin = network(), network()
    opt, undisturbed = (METHODS[method](m, lr=1e-2) for m in (model, twin))
    for optimizer, m in ((opt, model), (undisturbed, twin)):
        optimizer.step(loss_of(m))
    if name not in opt.param_groups[0]:
        return
    good = opt.param_groups[0][name]
    opt.param_groups[0][name] = bad
    with pytest.raises(error, match=name):
        opt.step(loss_of(model))
    undisturbed.flush()
    assert same(weights(model), weights(twin))
    opt.param_groups[0][name] = good
    for optimizer, m in ((opt, model), (undisturbed, twin)):
        optimizer.step(loss_of(m))
    assert same(weights(model), weights(twin))
    assert opt.step_count == 2


def test_a_tensor_that_becomes_bad_in_place() -> None:
    model = network()
    lr = torch.tensor(1e-2)
    opt = zo_fused.MeZO(model, lr=lr)
    opt.step(loss_of(model))
    before = weights(model)
    lr.fill_(math.nan)
    with pytest.raises(ValueError, match="lr"):
        opt.step(loss_of(model))
    assert same(weights(model), before)
    lr.fill_(1e-2)
    opt.step(loss_of(model))
    assert not same(weights(model), before)


@pytest.mark.parametrize(("name", "bad"), [("lr", math.nan), ("eps", 0.0)])
def test_a_bad_value_between_losses_and_step(name: str, bad: float) -> None:
    model = network()
    opt = zo_fused.MeZO(model, lr=1e-2)
    before = weights(model)
    opt.perturb(+1)
    opt.perturb(-1)
    opt.param_groups[0][name] = bad
    with pytest.raises(ValueError, match=name):
        opt.step(loss_plus=1.0, loss_minus=0.5)
    for now, then in zip(weights(model), before, strict=True):  # three roundings, near 1
        torch.testing.assert_close(now, then, rtol=0, atol=3 * 2.0**-24)


def test_a_scheduler_of_numpy_numbers() -> None:
    model, twin = network(), network()
    opt, plain = zo_fused.MeZO(model, lr=1.0), zo_fused.MeZO(twin, lr=1.0)
    cosine = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: np.cos(t / 10))
    for t in range(3):
        plain.param_groups[0]["lr"] = math.cos(t / 10)
        opt.step(loss_of(model))
        plain.step(loss_of(twin))
        assert type(opt.param_groups[0]["lr"]) is float
        cosine.step()
    assert same(weights(model), weights(twin))


# ---- groups -------------------------------------------------------------------------------------

EVERY = {"lr", "block"}


@pytest.mark.parametrize(
    ("method", "hyper"),
    [
        ("MeZO", EVERY | {"eps", "weight_decay", "rounding"}),
        ("MeZO-M deferred", EVERY | {"eps", "weight_decay", "rounding", "momentum", "dampening"}),
        ("LOZO", EVERY | {"eps", "weight_decay", "rounding", "rank", "interval"}),
        ("LOZO-M", EVERY | {"eps", "weight_decay", "rounding", "rank", "interval", "momentum"}),
        ("ZOAdam", EVERY | {"eps", "weight_decay", "rounding", "betas", "adam_eps"}),
        ("ZOSignSGD", EVERY | {"eps", "weight_decay", "rounding"}),
        ("ZOConservative", EVERY | {"eps"}),
        ("ForwardGrad", EVERY | {"weight_decay", "rounding"}),
    ],
)
def test_groups_have_what_the_method_uses(method: str, hyper: set[str]) -> None:
    group = METHODS[method](network()).param_groups[0]
    counters = {"seed", "step", "restores", "contract", "in_place", "method", "options", "log"}
    assert group.keys() - counters - {"params", "param_names"} == hyper


def test_one_cycle(tmp_path: Path) -> None:
    """It asks for a momentum; without, it says so, or cycles the learning rate alone."""
    model, base = network(), network()
    opt = zo_fused.MeZO(model, lr=1e-3)
    one_cycle = torch.optim.lr_scheduler.OneCycleLR
    with pytest.raises(ValueError, match="momentum"):
        one_cycle(opt, max_lr=1e-2, total_steps=20)
    schedule = one_cycle(opt, max_lr=1e-2, total_steps=20, cycle_momentum=False)
    opt.start_log(tmp_path / "log.jsonl")
    for _ in range(4):
        opt.step(loss_of(model))
        schedule.step()
    opt.close_log()
    zo_fused.replay(base, tmp_path / "log.jsonl")
    assert same(weights(base), weights(model))


@pytest.mark.parametrize("method", ["MeZO-M deferred", "LOZO-M", "ZOAdam"])
def test_one_cycle_with_momentum(method: str, tmp_path: Path) -> None:
    model, base = network(), network()
    opt = METHODS[method](model, lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=1e-2, total_steps=20)
    opt.start_log(tmp_path / "log.jsonl")
    for _ in range(4):
        opt.step(loss_of(model))
        schedule.step()
    opt.flush()
    zo_fused.replay(base, tmp_path / "log.jsonl")
    assert same(weights(base), weights(model))


@pytest.mark.parametrize(
    ("method", "group", "message"),
    [
        ("MeZO", {"epss": 1e-2}, "'epss': did you mean 'eps'?"),
        ("MeZO", {"wieght_decay": 0.1}, "did you mean 'weight_decay'?"),
        ("MeZO", {"betas": (0.9, 0.99)}, "a param group has betas, but MeZO has none"),
        ("MeZO", {"momentum": 0.9}, "a param group has momentum, but this MeZO was made without"),
        ("LOZO", {"momentum": 0.9}, "a param group has momentum, but this LOZO was made without"),
        ("MeZO", {"seed": 4}, "seed is the run's"),
        ("ZOConservative", {"weight_decay": 0.1}, "weight_decay, but ZOConservative has none"),
        ("MeZO", {"lr": "1e-3"}, "lr must be a number"),
        ("LOZO", {"block": 0.5}, "block must be a whole number, got 0.5"),
    ],
)
def test_groups_with_what_has_no_effect(method: str, group: dict[str, Any], message: str) -> None:
    """At construction and later; the optimizer is then as it was."""
    model = network()
    params = list(model.named_parameters())
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        METHODS[method]([{"params": params, **group}])
    opt = METHODS[method]([{"params": params[:2]}], lr=1e-2)
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        opt.add_param_group({"params": params[2:], **group})
    assert len(opt.param_groups) == 1
    opt.step(loss_of(model))
    if "seed" not in group:
        opt.param_groups[0].update(group)
        with pytest.raises((TypeError, ValueError), match=re.escape(message)):
            opt.step(loss_of(model))


def test_groups_keep_what_is_the_users() -> None:
    """Names, a scheduler's keys, and what other optimizers of a program need in its groups."""
    model = network()
    extra = {"name": "all", "initial_lr": 1.0, "lr_scale": 0.5, 7: "seven"}
    params = list(model.named_parameters())
    opt = zo_fused.ForwardGrad(model)
    opt.param_groups[0].update(extra)
    opt.step(loss_of(model))
    unused = {"momentum": 0, "dampening": 0, "weight_decay": 0.0}
    opt = zo_fused.ZOConservative([{"params": params, **extra, **unused}])  # type: ignore[assignment]
    opt.step(loss_of(model))
    assert extra.items() <= opt.param_groups[0].items()
    cyclic = torch.optim.lr_scheduler.CyclicLR(opt, 1e-4, 1e-3, cycle_momentum=False)
    for _ in range(2):
        opt.step(loss_of(model))
        cyclic.step()


EARLIER = {
    "MeZO": {"momentum": 0.0, "dampening": 0.0},
    "LOZO": {"momentum": 0.0},
    "ZOConservative": {"weight_decay": 0.0, "rounding": "nearest"},
    "ForwardGrad": {"eps": 1.0},
}


@pytest.mark.parametrize("method", list(EARLIER))
def test_states_of_earlier_versions(method: str) -> None:
    """Their groups have hyper-parameters without a use, which OneCycleLR may have changed."""
    model, twin = network(), network()
    opt = METHODS[method](model, lr=1e-2)
    opt.step(loss_of(model))

    state = copy.deepcopy(opt.state_dict())
    state["param_groups"][0].update(EARLIER[method])
    twin.load_state_dict(model.state_dict())
    again = METHODS[method](twin)
    again.load_state_dict(state)
    for optimizer, m in ((opt, model), (again, twin)):
        optimizer.step(loss_of(m))
    assert same(weights(twin), weights(model))
    assert not EARLIER[method].keys() & again.param_groups[0].keys()


# ---- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("layers.0.weight", "layers.0.weight"),
        ("_orig_mod.layers.0._orig_mod.weight", "layers.0.weight"),
        ("module.layers.0.weight", "layers.0.weight"),
        ("_orig_mod.module._orig_mod.weight", "weight"),
        ("_fsdp_wrapped_module.layers.0._checkpoint_wrapped_module.weight", "layers.0.weight"),
        ("encoder.module.weight", "encoder.module.weight"),
        ("module", "module"),
        ("module.module", "module"),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
    ],
)
def test_plain_names(name: str, plain: str) -> None:
    assert plain_name(name) == plain


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


WRAPPED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": compiled,
    "wrapped": nn.DataParallel,
    "both": lambda model: compiled(nn.DataParallel(model)),
}


@pytest.mark.parametrize("wrap", list(WRAPPED))
def test_noise_and_logs_of_a_wrapped_model_are_those_of_the_plain_one(
    wrap: str, tmp_path: Path
) -> None:
    model, plain, base = network(), network(), network()
    wrapped = WRAPPED[wrap](model)
    opt = zo_fused.MeZO(wrapped, lr=1e-2)
    opt.start_log(tmp_path / "log.jsonl")
    other = zo_fused.MeZO(plain.named_parameters(), lr=1e-2)
    for _ in range(2):
        opt.step(loss_of(wrapped))
        other.step(loss_of(plain))
    assert same(weights(model), weights(plain))
    assert opt.param_groups[0]["param_names"] == other.param_groups[0]["param_names"]
    again = WRAPPED[wrap](network())
    zo_fused.replay(base, tmp_path / "log.jsonl")
    zo_fused.replay(again, tmp_path / "log.jsonl")
    assert same(weights(base), weights(model))
    assert same(weights(again), weights(model))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_logs_of_wrapped_models_of_earlier_versions(prefix: str, tmp_path: Path) -> None:
    """Their noise comes from the names in them, which only the weights' place leaves out."""
    model, base = network(), network()
    opt = zo_fused.MeZO(model, lr=1e-2)
    opt.param_groups[0]["param_names"] = [prefix + name for name, _ in model.named_parameters()]
    opt.start_log(tmp_path / "log.jsonl")
    opt.step(loss_of(model))
    state = copy.deepcopy(opt.state_dict())
    zo_fused.replay(base, tmp_path / "log.jsonl")
    assert same(weights(base), weights(model))

    other = network()
    zo_fused.MeZO(other, lr=1e-2).step(loss_of(other))
    assert not same(weights(other), weights(model))  # of other names

    resumed = zo_fused.MeZO(base)  # goes on with the noise of the run
    resumed.load_state_dict(state)
    opt.step(loss_of(model))
    resumed.step(loss_of(base))
    assert same(weights(base), weights(model))


class Holder(nn.Module):
    """A plain model that calls a part of it `module`."""

    def __init__(self, clash: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.module = nn.Linear(6, 3, bias=False)
        self.register_parameter("weight" if clash else "scale", nn.Parameter(torch.ones(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x) * (self.scale if hasattr(self, "scale") else self.weight)


def test_a_submodule_that_is_called_module(tmp_path: Path) -> None:
    model, base = Holder(clash=False), Holder(clash=False)
    opt = zo_fused.MeZO(nn.DataParallel(model), lr=1e-2)
    opt.start_log(tmp_path / "log.jsonl")
    opt.step(loss_of(model))
    zo_fused.replay(base, tmp_path / "log.jsonl")
    assert same(weights(base), weights(model))
    clashing = Holder(clash=True)
    with pytest.raises(ValueError, match="two parameters have the same name, 'weight'"):
        zo_fused.MeZO(clashing)
    zo_fused.MeZO(clashing.parameters()).step(loss_of(clashing))  # by position


def test_blocks_of_a_compiled_model() -> None:
    """Patterns are those for the plain model."""
    patterns = [r"^0\.", "^2"]
    named = [
        [name for name, _ in group["params"]]
        for group in zo_fused.layer_blocks(compiled(network()), patterns)
    ]
    assert named == [[f"_orig_mod.{i}.{n}" for n in ("weight", "bias")] for i in (0, 2)]


# ---- memory -------------------------------------------------------------------------------------


def overlapping() -> dict[str, list[Tensor]]:
    storage, matrix = torch.zeros(20), torch.zeros(4, 4)
    return {
        "ranges": [storage[:10], storage[5:]],
        "inside": [storage, storage[3:5]],
        "transposed": [matrix, matrix.t()],
        "flat": [matrix, matrix.view(-1)],
        "dtypes": [storage[:4], storage[2:6].view(torch.float16)],
    }


@pytest.mark.parametrize("case", list(overlapping()))
def test_overlapping_parameters_are_refused(case: str) -> None:
    tensors = overlapping()[case]
    between = torch.zeros(3)  # the two are no neighbours in the list
    named = [("a", tensors[0]), ("c", between), ("b", tensors[1])]
    opt = zo_fused.MeZO([(name, nn.Parameter(t)) for name, t in named])
    with pytest.raises(ValueError, match="parameters 'a' and 'b' share a part of their memory"):
        opt.step(lambda: 1.0)
    with pytest.raises(ValueError, match=r"params\[0\] and params\[2\] share memory"):
        zo_fused.perturb_([t for _, t in named], 1, 0.5)
    assert not any(t.any() for t in tensors)
    opt.param_groups[0]["params"][2].requires_grad_(False)
    opt.step(lambda: 1.0)


def test_tied_and_neighbouring_parameters_are_not() -> None:
    storage = torch.zeros(20)
    whole = nn.Parameter(storage[:8])
    tied = [("a", whole), ("b", nn.Parameter(storage[8:])), ("c", nn.Parameter(whole.data))]
    opt = zo_fused.MeZO([*tied, ("empty", nn.Parameter(storage[4:4]))], lr=1.0)
    opt.step(loss_plus=1.0, loss_minus=0.0)
    assert bool((storage != 0).all())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: torch.randn(8, 8).chunk(2, 1)[0], ValueError, "'layer.q' is a view with gaps"),
        (lambda: torch.zeros(1).expand(4), ValueError, "'layer.q' is a view with gaps"),
        (lambda: torch.zeros(2, 2).to_sparse(), ValueError, "'layer.q' has layout sparse_coo"),
        (lambda: torch.zeros(2, device="meta"), ValueError, "'layer.q' is on the meta device"),
        (lambda: torch.zeros(2, dtype=torch.float64), TypeError, "'layer.q' has dtype"),
    ],
)
def test_parameters_that_cannot_be_swept(
    make: Callable[[], Tensor], error: type[Exception], message: str
) -> None:
    opt = zo_fused.MeZO([("layer.q", nn.Parameter(make()))])
    with pytest.raises(error, match=message):
        opt.step(lambda: 1.0)


def test_lazy_parameters() -> None:
    lazy = nn.LazyLinear(3)
    opt = zo_fused.MeZO(lazy)
    with pytest.raises(ValueError, match=r"'weight' is lazy.*run the model once"):
        opt.step(lambda: 1.0)


# ---- the functional layer -----------------------------------------------------------------------

P = torch.ones(3, 4)


def functions(p: Tensor) -> dict[str, tuple[type[Exception], str, Callable[[], None]]]:
    """What is wrong, and what is said of it."""
    q, two = torch.ones(5), [1, 2]
    update, perturb, lowrank = zo_fused.update_, zo_fused.perturb_, zo_fused.lowrank_update_
    moments = zo_fused.moments_update_
    key = "must be a whole number in [0, 2**64), got"
    return {
        "key 2**64": (ValueError, f"key[0] {key} {2**64}", lambda: perturb([p], 2**64, 1.0)),
        "key -1": (ValueError, f"keys[1] {key} -1", lambda: update([p], [1, -1], [1.0, 1.0])),
        "key 1.7": (ValueError, f"keys[0] {key} 1.7", lambda: update([p], [1.7], [1.0])),
        "key of a bool": (ValueError, f"key[0] {key} True", lambda: perturb([p], True, 1.0)),
        "float keys": (
            TypeError,
            "keys must be a tensor of int64, got torch.float32",
            lambda: update([p], torch.tensor([1.7]), [1.0]),
        ),
        "id 2**64": (ValueError, f"ids[0] {key}", lambda: perturb([p], 1, 1.0, ids=[2**64])),
        "id 0.5": (ValueError, f"ids[0] {key} 0.5", lambda: perturb([p], 1, 1.0, ids=[0.5])),  # type: ignore[list-item]
        "rounding key": (
            ValueError,
            f"rounding_key[0] {key} 2.5",
            lambda: update([p], [1], [1.0], rounding_key=2.5),  # type: ignore[arg-type]
        ),
        "offset 2**62": (
            ValueError,
            "offsets[0] must be a whole number in [0, 2**62)",
            lambda: perturb([p], 1, 1.0, offsets=[2**62]),
        ),
        "last element": (
            ValueError,
            "elements must lie in [0, 2**62)",
            lambda: perturb([p], 1, 1.0, offsets=[2**62 - 1]),
        ),
        "one coefficient for two keys": (
            ValueError,
            "coeffs must be [2] or [1, 2], got [1]",
            lambda: update([p], two, [0.5]),
        ),
        "a number for two keys": (
            ValueError,
            "coeffs must be [2] or [1, 2], got a number",
            lambda: update([p], two, 0.5),  # type: ignore[arg-type]
        ),
        "three coefficients": (
            ValueError,
            "coeffs must be [2] or [1, 2], got [3]",
            lambda: update([p], two, [0.5] * 3),
        ),
        "decays": (
            ValueError,
            "decay must be a number or [1], got [2]",
            lambda: update([p], [1], [0.5], [1.0, 1.0]),
        ),
        "text": (
            TypeError,
            "coeffs[0] must be a number, got '0.5'",
            lambda: update([p], [1], ["0.5"]),  # type: ignore[list-item]
        ),
        "overflow": (
            ValueError,
            "coeffs[0] must be finite in float32, got 1e+39",
            lambda: update([p], [1], [1e39]),
        ),
        "nan": (ValueError, "scale must be finite", lambda: perturb([p], 1, math.nan)),
        "nan in a tensor": (
            ValueError,
            "coeffs must be finite",
            lambda: update([p], [1], torch.tensor([math.nan])),
        ),
        "grads": (
            ValueError,
            "grads must be [2] or [1, 2], got [1]",
            lambda: moments([p], two, [1.0], "sign", 0.1),
        ),
        "firsts are params": (
            ValueError,
            "params[0] and firsts[0] share memory",
            lambda: moments([p], [1], [1.0], "momentum", 0.1, firsts=[p]),
        ),
        "factors are params": (
            ValueError,
            "params[0] and us[0] share memory",
            lambda: lowrank([p], [p], [torch.ones(4, 4)], 1.0),
        ),
        "twice": (
            ValueError,
            "params[0] and params[1] share memory",
            lambda: perturb([p, p], 1, 0.5),
        ),
        "a tensor for a list": (TypeError, "params must be a list", lambda: perturb(p, 1, 0.5)),
        "a number for a tensor": (
            TypeError,
            "params[1] must be a tensor, got float",
            lambda: perturb([p, 1.0], 1, 0.5),  # type: ignore[list-item]
        ),
        "meta": (
            ValueError,
            "params[0] is on the meta device",
            lambda: perturb([q.to("meta")], 1, 0.5),
        ),
        "rank": (
            ValueError,
            "rank must be a whole number",
            lambda: lowrank([p], 1, 2, 1.0, rank=0),
        ),
        "rank 2.0": (
            ValueError,
            "rank must be a whole number >= 1, got 2.0",
            lambda: lowrank([p], 1, 2, 1.0, rank=2.0),  # type: ignore[arg-type]
        ),
        "u": (ValueError, f"u[0] {key} -1", lambda: lowrank([p], -1, 2, 1.0, rank=1)),
    }


@pytest.mark.parametrize("case", list(functions(P)))
def test_functions_refuse_by_name(case: str) -> None:
    p = P.clone()
    error, message, call = functions(p)[case]
    with pytest.raises(error, match=re.escape(message)):
        call()
    assert torch.equal(p, P)


def test_functions_take_numbers_of_other_libraries() -> None:
    key, u, v = (derive_key(0, Purpose.DENSE, step) for step in range(3))
    half: list[Any] = [np.float32(0.5), np.array(0.5), Decimal("0.5"), torch.tensor(0.5)]
    wanted, factored = P.clone(), P.clone()
    zo_fused.update_([wanted], [key], [0.5], 0.5)
    zo_fused.lowrank_update_([factored], u, v, 0.5, rank=2)
    for value in half:
        p, q, r = P.clone(), P.clone(), P.clone()
        zo_fused.update_([p], [np.uint64(key)], [value], value, ids=[np.int64(0)])
        zo_fused.update_(
            [q], np.array([key], np.uint64), value, np.full(1, 0.5), ids=np.zeros(1, int)
        )
        zo_fused.lowrank_update_([r], np.uint64(u), np.uint64(v), value, rank=np.int32(2))  # type: ignore[arg-type]
        assert torch.equal(p, wanted)
        assert torch.equal(q, wanted)
        assert torch.equal(r, factored)


def test_functions_compile_without_graph_breaks() -> None:
    keys = torch.tensor([3, -5])
    coeffs, half = torch.tensor([0.5, -0.25]), torch.tensor(0.5)
    u, v = torch.ones(3, 2), torch.ones(4, 2)

    def sweeps(p: Tensor) -> Tensor:
        zo_fused.update_([p], keys, coeffs, half)
        zo_fused.perturb_([p], 2**64 - 5, 0.5, ids=[2**63])
        zo_fused.lowrank_update_([p], [u], [v], half, 0.5)
        return p * 2

    a, b = P.clone(), P.clone()
    assert torch.equal(torch.compile(sweeps, fullgraph=True, backend="aot_eager")(a), sweeps(b))
    assert torch.equal(a, b)


def test_low_rank_sweeps_over_no_rows() -> None:
    """(0, 5) is seen as a matrix of no rows and five columns."""
    for shape in ((0, 5), (5, 0), (0,)):
        p = torch.zeros(shape)
        zo_fused.lowrank_update_([p], 1, 2, 0.5, rank=2)
        zo_fused.lowrank_update_([p, P.clone()], 1, 2, 0.5, rank=2)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"numel": 2.0}, "numel"),
        ({"numel": -1}, "numel"),
        ({"key": -1}, "key"),
        ({"key": 2**64}, "key"),
        ({"id": 1.7}, "id"),
        ({"id": 2**64}, "id"),
        ({"offset": 2**62}, "offset"),
        ({"offset": 2**62 - 1}, "offset"),
    ],
)
def test_noise_refuses_by_name(arguments: dict[str, Any], name: str) -> None:
    for make in (noise.normal, noise.random_bits):
        with pytest.raises(ValueError, match=name):
            make(**{"numel": 2, "key": 1, **arguments})


def test_derive_key_refuses_what_is_no_whole_number() -> None:
    """1.0 is not 1 where a key of 1 was derived before."""
    wanted = derive_key(1, 1, 1, 1)
    assert derive_key(np.int64(1), Purpose.DENSE, torch.tensor(1), np.uint32(1)) == wanted  # type: ignore[arg-type]
    for position in range(4):
        for bad in (1.0, -1, True, None, 2**64):
            arguments: list[Any] = [1, 1, 1, 1]
            arguments[position] = bad
            with pytest.raises(ValueError, match="must be a whole number"):
                derive_key(*arguments)
