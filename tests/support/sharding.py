"""What processes with sharded models check; `tests/step/test_sharded.py` starts them.

Every process does the same; a check raises where something is wrong. Models are so small that each
process also trains the whole one by itself, to compare. Losses are bit-equal on all ranks and equal
to those of one process: all have the same batch, FSDP2 gathers whole weights, and the mean over
processes of a number is that number.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import zo_fused
from zo_fused.noise import derive_key
from zo_fused.step.fingerprint import fingerprint
from zo_fused.sweeps.shards import local, shard_of

Check = Callable[[Path], None]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


def run(rank: int, world: int, names: list[str], folder: str) -> None:
    """In each process: what went wrong goes into a file, a check each."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    for name in names:
        try:
            CHECKS[name](Path(folder))
        except BaseException:
            Path(folder, f"{name}.{rank}").write_text(traceback.format_exc())
            sys.stdout.flush()
            os._exit(1)  # the others would wait in a collective
        Path(folder, f"{name}.{rank}").write_text("")
    dist.barrier()
    dist.destroy_process_group()


# ---- models -------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """Sizes that no number of processes divides; one parameter of a single element."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.scale = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(6, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x * self.scale)


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


TOKENS = torch.arange(11).repeat(2)
LABELS = TOKENS % 5


def loss_of(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(TOKENS).float(), LABELS)


def mean(loss: Tensor) -> Tensor:
    loss = loss.detach().double()
    dist.all_reduce(loss)
    return loss / dist.get_world_size()


def wrapped(model: nn.Module, mesh: DeviceMesh | None = None, **options: Any) -> nn.Module:
    """FSDP2, as its tutorial has it."""
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_equal(model: nn.Module, wanted: nn.Module) -> None:
    """Of each parameter, all bits."""
    for (name, p), q in zip(model.named_parameters(), wanted.parameters(), strict=True):
        found = whole(p.detach())
        assert torch.equal(found, q), (name, (found - q).abs().max())


def check_all_equal(model: nn.Module, other: nn.Module) -> None:
    """Of two sharded models."""
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(local(p), local(q))


def moved(model: nn.Module) -> bool:
    return any(
        not torch.equal(p, q) for p, q in zip(model.parameters(), net().parameters(), strict=True)
    )


# ---- where shards lie ---------------------------------------------------------------------------


def placements() -> list[tuple[DeviceMesh, tuple[Any, ...], tuple[int, ...]]]:
    world = dist.get_world_size()
    line = init_device_mesh("cpu", (world,))
    cases: list[Any] = [
        (line, (placement,), shape)
        for shape in [(8, 6), (5, 3), (1, 7), (3, 5, 4)]
        for placement in [Shard(0), Shard(1), Replicate()]
    ]
    cases += [(line, (Shard(2),), (3, 5, 7)), (line, (Shard(0),), (1,)), (line, (Shard(0),), (9,))]
    if world == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        pairs = [(Shard(0), Shard(1)), (Shard(0), Shard(0)), (Replicate(), Shard(1))]
        cases += [(square, pair, shape) for pair in pairs for shape in [(8, 6), (5, 3)]]
    return cases


@check
def weights_that_hold_their_index(folder: Path) -> None:
    for mesh, places, shape in placements():
        index = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
        p = distribute_tensor(index, mesh, places)
        runs = shard_of(p, "p").runs(local(p).shape)
        found = [e for run in runs for e in range(run.start, run.start + run.length)]
        assert found == local(p).flatten().tolist(), (places, shape)


@check
def functions_take_dtensors(folder: Path) -> None:
    key, u, v = (derive_key(0, purpose) for purpose in (1, 2, 3))
    for dtype in (torch.float32, torch.bfloat16):
        for mesh, places, shape in placements():
            q = torch.zeros(shape, dtype=dtype)
            p = distribute_tensor(q.clone(), mesh, places)
            for tensor in (q, p):
                zo_fused.update_([tensor], [key], [0.5], ids=[7], rounding_key=3)
                zo_fused.lowrank_update_([tensor], u, v, 0.1, rank=2, ids=[7], rounding_key=4)
            assert torch.equal(p.full_tensor(), q), (places, shape)


@check
def partial_sums_are_refused(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    p = DTensor.from_local(torch.zeros(4), mesh, [Partial()])
    with pytest.raises(NotImplementedError, match="Partial"):
        zo_fused.perturb_([p], 1, 1.0)


# ---- runs ---------------------------------------------------------------------------------------

FACTORED: dict[str, Any] = {"lr": 1e-2, "eps": 1e-2, "rank": 2, "interval": 3, "mode": "factored"}
METHODS: dict[str, Callable[[Any], Any]] = {
    "mezo": lambda m: zo_fused.MeZO(m, lr=1e-2, eps=1e-2, weight_decay=0.1),
    "mezo-queries": lambda m: zo_fused.MeZO(m, lr=1e-2, eps=1e-2, queries=2, one_sided=True),
    "mezo-deferred": lambda m: zo_fused.MeZO(m, lr=1e-2, eps=1e-2, deferred=True),
    "momentum": lambda m: zo_fused.MeZO(m, lr=1e-2, eps=1e-2, momentum=0.9),
    "adam": lambda m: zo_fused.ZOAdam(m, lr=1e-2, eps=1e-2),
    "adam-deferred": lambda m: zo_fused.ZOAdam(m, lr=1e-2, eps=1e-2, deferred=True),
    "sign": lambda m: zo_fused.ZOSignSGD(m, lr=1e-3, eps=1e-2),
    "conservative": lambda m: zo_fused.ZOConservative(m, lr=1e-2, eps=1e-2),
    "kerzoo": lambda m: zo_fused.KerZOO(m, lr=1e-2, eps=1e-2),
    "fzoo": lambda m: zo_fused.FZOO(m, lr=1e-2, eps=1e-2),
    "meazo": lambda m: zo_fused.MEAZO(m, lr=1e-2, eps=1e-2),
    "es": lambda m: zo_fused.ES(m, lr=1e-2, eps=1e-2, population=4),
    "blocks": lambda m: zo_fused.MeZO(m, lr=1e-2, eps=1e-2, momentum=0.9, block_order="sequential"),
    "lozo": lambda m: zo_fused.LOZO(m, lr=1e-2, eps=1e-2, rank=2, interval=2),
    "subzero": lambda m: zo_fused.SubZero(
        m, lr=1e-2, eps=1e-2, rank=48, interval=2, mode="inplace"
    ),
    "tezo": lambda m: zo_fused.TeZO(m, lr=1e-2, eps=1e-2, rank=3, interval=2, deferred=True),
    "lozo-m": lambda m: zo_fused.LOZO(m, lr=1e-2, eps=1e-2, rank=2, interval=2, momentum=0.9),
    "lozo-adam": lambda m: zo_fused.LOZO(
        m, lr=1e-2, eps=1e-2, rank=2, interval=3, moments="adam", deferred=True
    ),
    "factored": lambda m: zo_fused.LOZO(m, weight_decay=0.1, queries=2, **FACTORED),
    "factored-m": lambda m: zo_fused.LOZO(m, momentum=0.9, **FACTORED),
    "subzero-factored": lambda m: zo_fused.SubZero(m, **FACTORED | {"rank": 48}),
    "tezo-factored": lambda m: zo_fused.TeZO(m, one_sided=True, **FACTORED),
}


def train(model: nn.Module, make: Callable[[Any], Any], loss: Callable[[], Any], steps: int) -> Any:
    optimizer = make(model)
    for _ in range(steps):
        optimizer.step(loss)
    optimizer.flush()
    return optimizer


@check
def fsdp_runs_equal_one_process(folder: Path) -> None:
    for name, make in METHODS.items():
        alone, model = net(), wrapped(net())
        train(alone, make, lambda alone=alone: loss_of(alone), 4)
        train(model, make, lambda model=model: mean(loss_of(model)), 4)
        assert moved(alone), name
        check_equal(model, alone)


@check
def fsdp_in_bfloat16_with_stochastic_rounding(folder: Path) -> None:
    def mezo(m: nn.Module) -> Any:
        return zo_fused.MeZO(m, lr=1e-2, eps=1e-2, rounding="stochastic")

    for make in (mezo, METHODS["factored"]):
        alone, model = net(torch.bfloat16), wrapped(net(torch.bfloat16))
        train(alone, make, lambda alone=alone: loss_of(alone), 4)
        train(model, make, lambda model=model: mean(loss_of(model)), 4)
        check_equal(model, alone)


class Table(nn.Module):
    """Parameters of any placement, and a loss of their whole."""

    def __init__(self, mesh: DeviceMesh | None, places: tuple[Any, ...]) -> None:
        super().__init__()
        torch.manual_seed(1)
        for name, shape in {"a": (7, 6), "b": (4, 5), "c": (3, 6, 2), "d": (2, 9)}.items():
            p = torch.randn(shape)
            self.register_parameter(
                name, nn.Parameter(p if mesh is None else distribute_tensor(p, mesh, places))
            )

    def forward(self) -> Tensor:
        return torch.stack([whole(p).sin().sum() for p in self.parameters()]).sum()


@check
def runs_of_any_placement_equal_one_process(folder: Path) -> None:
    cases = [(mesh, places) for mesh, places, shape in placements() if len(shape) == 2]
    seen = list(dict.fromkeys(cases))  # in the same order everywhere
    for name in ("mezo-deferred", "adam", "lozo", "subzero", "tezo", "lozo-m"):
        alone = Table(None, ())
        train(alone, METHODS[name], alone, 3)
        for mesh, places in seen:
            if name == "lozo-m" and any(getattr(place, "dim", 0) for place in places):
                continue
            model = Table(mesh, places)
            train(model, METHODS[name], model, 3)
            check_equal(model, alone)


# ---- gathered weights of before -----------------------------------------------------------------


@torch.no_grad()
def change(model: nn.Module) -> tuple[float, float]:
    """The change of the loss that the next forward pass sees when the shards of the root are
    changed, and the true one."""
    before = float(loss_of(model))
    alone = net()
    for m in (model, alone):
        for name, p in m.named_parameters():
            if name.startswith(("embedding", "head")):
                local(p).mul_(1.1)
    return float(loss_of(model)) - before, float(loss_of(alone)) - before


@check
def the_trap_is_there(folder: Path) -> None:
    model = wrapped(net())
    params = dict(model.named_parameters())
    with torch.no_grad():
        before = float(loss_of(model))
        local(params["head.weight"]).mul_(1.1)
        assert float(loss_of(model)) == before
    assert not isinstance(model.head.weight, DTensor)


@check
def the_optimizer_closes_it(folder: Path) -> None:
    for options in ({}, {"reshard_after_forward": False}):
        model = wrapped(net(), **options)
        optimizer = zo_fused.MeZO(model)
        optimizer.look()
        seen, true = change(model)
        assert seen == true != 0
        assert isinstance(model.head.weight, DTensor)


@check
def optimizer_made_while_weights_are_gathered(folder: Path) -> None:
    alone, model = net(), wrapped(net())
    with torch.no_grad():
        loss_of(model)
    assert not isinstance(model.head.weight, DTensor)
    train(alone, METHODS["mezo"], lambda: loss_of(alone), 3)
    train(model, METHODS["mezo"], lambda: mean(loss_of(model)), 3)
    check_equal(model, alone)


@check
def weights_gathered_between_steps(folder: Path) -> None:
    alone, model = net(), wrapped(net())
    one, other = METHODS["mezo"](alone), METHODS["mezo"](model)
    for _ in range(3):
        one.step(lambda: loss_of(alone))
        other.step(lambda: mean(loss_of(model)))
        model.set_reshard_after_forward(False)
        with torch.no_grad():
            assert torch.equal(loss_of(model), loss_of(alone))
    model.set_reshard_after_forward(True)
    for part in (model, *model.blocks):
        part.reshard()
    check_equal(model, alone)


@check
def fsdp_remembers_no_forward_passes(folder: Path) -> None:
    """Until a backward pass it would: a list that grows, and a pass that was broken off."""
    model = wrapped(net())
    optimizer = METHODS["mezo"](model)

    def remembered() -> tuple[int, bool]:
        state = model._get_fsdp_state()  # type: ignore[operator]
        passes = len(state._comm_ctx.post_forward_order)
        return passes, state._state_ctx.iter_forward_root is not None

    def broken_off(*_: Any) -> None:
        raise ArithmeticError

    for _ in range(3):
        optimizer.step(lambda: loss_of(model))
    assert remembered() == (2 * 3, False)  # of one step
    hook = model.blocks[1].register_forward_pre_hook(broken_off)  # type: ignore[index,union-attr]
    with pytest.raises(ArithmeticError):
        optimizer.step(lambda: loss_of(model))
    hook.remove()
    assert remembered()[1]
    optimizer.look()
    assert remembered() == (0, False)


@check
def deferred_weights_are_at_theta_for_whoever_looks(folder: Path) -> None:
    looks: dict[str, Callable[[nn.Module], Any]] = {
        "forward": lambda m: loss_of(m),
        "to_local": lambda m: m.head.weight.to_local() if dist.is_initialized() else None,
        "full_tensor": lambda m: whole(m.head.weight.detach()),
        "state_dict": lambda m: m.state_dict()["head.weight"],
    }
    for name, look in looks.items():
        alone, model = net(), wrapped(net())
        one, other = METHODS["mezo-deferred"](alone), METHODS["mezo-deferred"](model)
        for _ in range(2):
            one.step(lambda alone=alone: loss_of(alone))
            other.step(lambda model=model: mean(loss_of(model)))
        assert one.weights.place.at
        assert other.weights.place.at
        one.flush()
        with torch.no_grad():
            found = look(model)
        assert not other.weights.place.at, name
        if name == "forward":
            assert torch.equal(found, loss_of(alone))
        check_equal(model, alone)


# ---- what is kept beside weights that FSDP2 gathers ---------------------------------------------


class Uses(nn.Module):
    """Of weights, beside those that layers make of theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.tables: list[dict[str, Tensor]] = []  # what no module holds

    def forward(self) -> Tensor:
        x = self.net.embedding(TOKENS)
        for block in self.net.blocks:
            x = block(x)
        x = F.linear(x, self.net.head.weight, self.net.head.bias) * self.net.embedding.weight.sum()
        for table in self.tables:
            x = x + whole(table["head.weight"]).sum()  # of a shard, this is no function of torch
        return F.cross_entropy(x * self.net.scale, LABELS)


def check_factored(alone: nn.Module, model: nn.Module, *losses: Callable[[], Any]) -> Any:
    """The same matrices are perturbed in place; returns which."""
    pair = [
        train(m, METHODS["factored"], loss, 4)
        for m, loss in zip((alone, model), losses, strict=True)
    ]
    one, other = (optimizer.param_groups[0]["in_place"] for optimizer in pair)
    assert one == other
    check_equal(model, alone)
    return one


@check
def factored_steps_keep_all_matrices_beside(folder: Path) -> None:
    alone, model = net(), wrapped(net(), reshard_after_forward=False)
    with torch.no_grad():
        loss_of(model)
    losses = (lambda: loss_of(alone)), (lambda: mean(loss_of(model)))
    assert check_factored(alone, model, *losses) == ()


@check
def factored_steps_see_other_uses_of_weights(folder: Path) -> None:
    """The embedding has a use without a side path; the head none, unless the shard itself is
    asked."""
    for held in (False, True):
        alone, model = Uses(), Uses()
        for block in model.net.blocks:
            fully_shard(block)
        fully_shard(model)
        for m in (alone, model) if held else ():
            m.tables.append(dict(m.net.named_parameters()))
        left_out = check_factored(alone, model, alone, model)
        names = [name for name, _ in model.named_parameters()]
        found = {names[i] for i in left_out}
        assert found == {"net.embedding.weight"} | ({"net.head.weight"} if held else set())


@check
def factored_steps_with_tied_weights(folder: Path) -> None:
    def tied() -> Net:
        model = net()
        model.head = nn.Linear(6, 11)
        model.head.weight = model.embedding.weight
        return model

    alone, model = tied(), tied()
    fully_shard([model.embedding, model.head])
    model = wrapped(model)
    losses = (lambda: loss_of(alone)), (lambda: mean(loss_of(model)))
    assert check_factored(alone, model, *losses) == ()


@check
def factored_steps_that_are_broken_off(folder: Path) -> None:
    """In the middle of a forward pass, at either sign."""
    alone, model = net(), wrapped(net())
    pair = [(m, METHODS["factored"](m)) for m in (alone, model)]
    for step in range(6):
        for m, optimizer in pair:
            calls = iter(range(step, step + 4))

            def fails(*_: Any, calls: Any = calls) -> None:
                if next(calls) % 4 == 3:
                    raise ArithmeticError

            hook = m.blocks[1].register_forward_pre_hook(fails)  # type: ignore[index,union-attr]
            with pytest.raises(ArithmeticError):
                optimizer.step(lambda m=m: loss_of(m))
            hook.remove()
            optimizer.step(lambda m=m: loss_of(m))
    with torch.no_grad():  # whoever looks finds theta
        assert torch.equal(loss_of(model), loss_of(alone))
    check_equal(model, alone)


@check
def factored_steps_in_place_where_nothing_is_gathered(folder: Path) -> None:
    """Under tensor parallel all, over FSDP2 what it cuts; shards of FSDP2 that have columns cut."""
    world = dist.get_world_size()

    def nearest(m: nn.Module) -> Any:
        return zo_fused.LOZO(m, rounding="nearest", **FACTORED)

    by_columns = net()
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    copies = None if world == 2 else mesh
    columns = {(10, 6): Shard(1)}
    fully_shard(by_columns, mesh=copies, shard_placement_fn=lambda p: columns.get(tuple(p.shape)))
    both = tensor_parallel(net(), mesh["tp"])
    for model in (by_columns, both if world == 2 else wrapped(both, mesh["dp"])):
        alone, loss = net(), partial(loss_of, model)
        optimizer = train(model, nearest, lambda loss=loss: mean(loss()), 4)
        train(alone, nearest, lambda alone=alone: loss_of(alone), 4)
        check_close(model, alone)
        names = [name for name, _ in model.named_parameters()]
        found = {names[i] for i in optimizer.param_groups[0]["in_place"]}
        assert {"blocks.0.up.weight", "blocks.1.up.weight"} <= found


# ---- tensor parallel ----------------------------------------------------------------------------


PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for block in model.blocks:  # type: ignore[union-attr]
        parallelize_module(block, mesh, PLAN)
    return model


def check_close(model: nn.Module, alone: nn.Module) -> None:
    """Sums over the columns of `down` are rounded otherwise: the loss, of size 2, by 2**-23 or so,
    so g by 2**-23 / eps, and weights by that times lr and z in each of 4 steps."""
    bound = 4 * 2**-21 / 1e-2 * 1e-2 * 5
    for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert (whole(p.detach()) - q).abs().max() < bound, name
    copies = [p.detach() for p in model.parameters() if not isinstance(p, DTensor)]
    for p in copies:
        others = [torch.empty_like(p) for _ in range(dist.get_world_size())]
        dist.all_gather(others, p)
        assert all(torch.equal(p, other) for other in others)


@check
def tensor_parallel_runs(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name in ("mezo", "mezo-deferred", "lozo"):
        alone, model = net(), tensor_parallel(net(), mesh)
        train(alone, METHODS[name], lambda alone=alone: loss_of(alone), 4)
        train(model, METHODS[name], lambda model=model: mean(loss_of(model)), 4)
        assert moved(alone)
        check_close(model, alone)


@check
def fsdp_over_tensor_parallel(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    index = net()
    with torch.no_grad():
        for p in index.parameters():
            p.copy_(torch.arange(p.numel(), dtype=torch.float32).view(p.shape))
    strided = 0
    for p in wrapped(tensor_parallel(index, mesh["tp"]), mesh["dp"]).parameters():
        runs = shard_of(p, "p").runs(local(p).shape)
        found = [e for run in runs for e in range(run.start, run.start + run.length)]
        assert found == local(p).flatten().tolist()
        strided += any(type(place).__name__ == "_StridedShard" for place in p.placements)
    assert strided
    for name in ("mezo", "adam", "lozo"):
        alone, model = net(), wrapped(tensor_parallel(net(), mesh["tp"]), mesh["dp"])
        train(alone, METHODS[name], lambda alone=alone: loss_of(alone), 4)
        train(model, METHODS[name], lambda model=model: mean(loss_of(model)), 4)
        if name != "adam":  # which divides what is rounded otherwise by what is small
            check_close(model, alone)


# ---- saving -------------------------------------------------------------------------------------


@check
def states_can_be_taken_before_and_after_steps(folder: Path) -> None:
    for name in ("mezo", "adam", "lozo", "lozo-m"):
        model = wrapped(net())
        optimizer = METHODS[name](model)
        for _ in range(2):
            get_optimizer_state_dict(model, optimizer)
            assert optimizer.param_groups[0]["lr"] == 1e-2
            assert all(p.grad is None or not p.grad.any() for p in model.parameters())
            optimizer.step(lambda model=model: mean(loss_of(model)))


SAVED = ("adam", "lozo-m")  # in the middle of a window


@check
def save_with_dcp(folder: Path) -> None:
    for name in SAVED:
        model = wrapped(net())
        optimizer = train(model, METHODS[name], lambda m=model: mean(loss_of(m)), 3)
        state = {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer),
        }
        dcp.save(state, checkpoint_id=folder / f"checkpoint-{name}")


def load_with_dcp(folder: Path, name: str, model: nn.Module, saved: str = "checkpoint") -> Any:
    """The optimizer of that run, after three steps, and its model."""
    optimizer = METHODS[name](model)
    optimizer.param_groups[0]["lr"] = 1.0
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    dcp.load(state, checkpoint_id=folder / f"{saved}-{name}")
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    assert optimizer.param_groups[0]["lr"] == 1e-2
    assert optimizer.step_count == 3
    return optimizer


@check
def load_in_another_world(folder: Path) -> None:
    for name in SAVED:
        alone, model = net(), wrapped(net())
        train(alone, METHODS[name], lambda m=alone: loss_of(m), 5)
        optimizer = load_with_dcp(folder, name, model)
        for _ in range(2):
            optimizer.step(lambda m=model: mean(loss_of(m)))
        check_equal(model, alone)


# ---- copies of a sharded model that share a step's queries --------------------------------------


def two_copies(query: bool = True) -> tuple[nn.Module, zo_fused.Parallel]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("query", "shard"))
    parallel = zo_fused.Parallel(query=mesh["query"], data=mesh["shard"] if query else None)
    return wrapped(net(), mesh["shard"]), parallel


@check
def copies_share_queries(folder: Path) -> None:
    """Each copy evaluates its part of a step's perturbations. All have the bits of one process that
    evaluates all of them, also in bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        for name in ("mezo-four", "adam-four", "lozo-four"):
            alone, (model, parallel) = net(dtype), two_copies()
            model.to(dtype)
            train(alone, partial(FOUR[name], parallel=None), lambda m=alone: loss_of(m), 4)
            train(model, partial(FOUR[name], parallel=parallel), lambda m=model: loss_of(m), 4)
            check_equal(model, alone)


FOUR: dict[str, Callable[..., Any]] = {
    "mezo-four": lambda m, **o: zo_fused.MeZO(m, lr=1e-2, eps=1e-2, queries=4, **o),
    "adam-four": lambda m, **o: zo_fused.ZOAdam(
        m, lr=1e-2, eps=1e-2, queries=4, deferred=True, one_sided=True, **o
    ),
    "lozo-four": lambda m, **o: zo_fused.LOZO(
        m, lr=1e-2, eps=1e-2, rank=2, interval=2, queries=4, **o
    ),
}


@check
def logs_of_copies(folder: Path) -> None:
    model, parallel = two_copies()
    make, log = partial(FOUR["mezo-four"], parallel=parallel), folder / "copies.jsonl"
    logged(model, make, log, lambda: loss_of(model), 3)
    dist.barrier()
    base = net()
    zo_fused.replay(base, log)
    check_equal(model, base)


@check
def copies_that_cannot_share(folder: Path) -> None:
    model, parallel = two_copies(query=False)
    optimizer = zo_fused.MeZO(model, queries=2, parallel=parallel)
    with pytest.raises(NotImplementedError, match="don't tell each other their losses"):
        optimizer.step(lambda: loss_of(model))
    model, parallel = two_copies()
    optimizer = zo_fused.MeZO(model, queries=2, parallel=parallel)
    with torch.no_grad():
        if dist.get_rank() == 3:
            local(model.head.weight)[:1] += 1e-3  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="ranks have other weights: 1 of"):
        optimizer.step(lambda: loss_of(model))


# ---- copies that have batches of their own (HSDP) -----------------------------------------------


def copies() -> nn.Module:
    """Two, each on two processes, by FSDP2 itself."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return wrapped(net(), mesh)


@check
def copies_equal_one_process(folder: Path) -> None:
    for make in METHODS.values():
        alone, model = net(), copies()
        train(alone, make, lambda alone=alone: loss_of(alone), 4)
        train(model, make, lambda model=model: mean(loss_of(model)), 4)
        check_equal(model, alone)


@check
def copies_are_saved_and_logged(folder: Path) -> None:
    for name in SAVED:
        alone, model, log = net(), copies(), folder / f"hsdp-{name}.jsonl"
        optimizer = logged(model, METHODS[name], log, lambda m=model: loss_of(m), 3)
        state = {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer),
        }
        dcp.save(state, checkpoint_id=folder / f"hsdp-checkpoint-{name}")
        train(alone, METHODS[name], lambda m=alone: loss_of(m), 5)
        for again in (copies(), wrapped(net())):  # also where there is one copy
            optimizer = load_with_dcp(folder, name, again, "hsdp-checkpoint")
            for _ in range(2):
                optimizer.step(lambda m=again: loss_of(m))
            check_equal(again, alone)
        replayed = copies()
        zo_fused.replay(replayed, log)
        check_all_equal(replayed, model)


@check
def copies_that_differ(folder: Path) -> None:
    model = copies()
    with torch.no_grad():
        if dist.get_rank() == 3:
            local(model.head.weight)[:1] += 1e-3
    with pytest.raises(RuntimeError, match="ranks have other weights: 1 of"):
        zo_fused.MeZO(model).step(lambda: loss_of(model))


# ---- logs ---------------------------------------------------------------------------------------


@check
def fingerprints_of_any_placement(folder: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for mesh, places, shape in placements():
            q = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
            p = distribute_tensor(q.clone(), mesh, places)
            assert fingerprint([q, p]) == fingerprint([q, q]) != fingerprint([q, q + 1])


def logged(
    model: nn.Module, make: Callable[[Any], Any], log: Path, loss: Callable[[], Any], steps: int
) -> Any:
    optimizer = make(model)
    optimizer.start_log(log)
    for _ in range(steps):
        optimizer.step(loss)
    optimizer.close_log()
    return optimizer


@check
def logs_are_those_of_one_process(folder: Path) -> None:
    for name in ("mezo-queries", "mezo-deferred", "adam", "blocks", "lozo-m", "factored-m"):
        make, rank = METHODS[name], dist.get_rank()
        alone, model = net(), wrapped(net())
        mine, theirs = folder / f"{name}-{rank}.jsonl", folder / f"{name}.jsonl"
        one = logged(alone, lambda m, make=make: make(m), mine, lambda a=alone: loss_of(a), 4)
        logged(model, make, theirs, lambda m=model: mean(loss_of(m)), 4).flush()
        one.flush()
        dist.barrier()  # the first process has written the last line
        assert mine.read_bytes() == theirs.read_bytes(), name
        base = net()
        zo_fused.replay(base, theirs)
        check_equal(model, base)
        again = wrapped(net())
        with torch.no_grad():
            loss_of(again)  # FSDP2 has gathered weights of before
        zo_fused.replay(again, mine if rank == 0 else "/elsewhere")
        check_equal(again, alone)
        with torch.no_grad():
            assert torch.equal(loss_of(again), loss_of(alone))


@check
def runs_go_on_by_their_logs(folder: Path) -> None:
    for name in ("momentum", "adam-deferred", "lozo-m", "factored-m"):
        make, log = METHODS[name], folder / f"goes-on-{name}.jsonl"
        model = wrapped(net())
        logged(model, make, log, lambda m=model: mean(loss_of(m)), 3)
        path = log if dist.get_rank() == 0 else folder / "elsewhere"
        model = wrapped(net())
        optimizer = make(model)
        assert optimizer.replay(path) == 3
        optimizer.start_log(path, resume=True)
        for _ in range(2):
            optimizer.step(lambda m=model: mean(loss_of(m)))
        optimizer.close_log()
        again = wrapped(net())
        joined = make(again)
        assert joined.join(path) == 5
        joined.step(lambda m=again: mean(loss_of(m)))
        optimizer.step(lambda m=model: mean(loss_of(m)))
        check_all_equal(model, again)
        assert not (folder / "elsewhere").exists()
        fresh = wrapped(net())  # by all
        with pytest.raises((NotImplementedError, RuntimeError)):  # the first one's part has moved
            (joined if dist.get_rank() == 0 else make(fresh)).join()


@check
def logs_that_do_not_fit(folder: Path) -> None:
    """All processes say so, and none waits for another."""
    model, log = wrapped(net()), folder / "fits.jsonl"
    logged(model, METHODS["mezo"], log, lambda: mean(loss_of(model)), 1)
    with pytest.raises(ValueError, match="other base weights"):
        zo_fused.replay(model, log)
    with pytest.raises((FileNotFoundError, RuntimeError)):
        zo_fused.replay(model, folder / "nothing.jsonl")
    with pytest.raises((OSError, RuntimeError)):
        METHODS["mezo"](model).start_log(folder)


# ---- refused ------------------------------------------------------------------------------------


@check
def what_cannot_be_is_refused(folder: Path) -> None:
    model = wrapped(net())
    before = deepcopy(get_model_state_dict(model))
    with pytest.raises(ValueError, match="give the optimizer the whole module"):
        zo_fused.MeZO(model.named_parameters())
    refused: list[Callable[[Any], Any]] = [
        lambda m: zo_fused.LOZO(m, mode="factored", paired=True),
        lambda m: zo_fused.ZOMuon(m, mode="factored"),
        lambda m: zo_fused.MeZO(m, prior="guiding"),
        *(kind for kind in (zo_fused.SeeZO, zo_fused.HiZOO, zo_fused.ConMeZO, zo_fused.ZOMuon)),
        *(kind for kind in (zo_fused.SparseMeZO, zo_fused.LOREN)),
        lambda m: zo_fused.PGAP(m, total_steps=9),
        lambda m: zo_fused.TeZO(m, moments="adam"),
        zo_fused.ForwardGrad,
    ]
    for make in refused:
        with pytest.raises(NotImplementedError, match=r"can't tune parameter .*, a DTensor"):
            make(model)
    with pytest.raises(NotImplementedError, match="don't tell each other their losses"):
        zo_fused.MeZO(model, parallel=None).start_log(folder / "log.jsonl")
    for name, value in get_model_state_dict(model).items():
        assert torch.equal(whole(value), whole(before[name]))
    by_columns = tensor_parallel(net(), init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = METHODS["lozo-m"](by_columns)
    with pytest.raises(NotImplementedError, match="cut along its columns"):
        optimizer.step(lambda: loss_of(by_columns))
    for make in (
        lambda m: zo_fused.TeZO(m, momentum=0.9),
        lambda m: zo_fused.SubZero(m, moments="adam"),
    ):
        with pytest.raises(NotImplementedError, match="do without momentum"):
            make(model).step(lambda: loss_of(model))
