"""What processes check whose models transformers or accelerate shard; `tests/hf/test_sharded.py`
starts them, by torchrun. As in `support.sharding`, runs in one process are there to compare with.

accelerate shards on GPUs only: `gpus` has it take CPUs for such.
"""

from __future__ import annotations

import functools
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import peft
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from support import trainers
from support.sharding import check_all_equal, check_equal, whole
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, default_data_collator
from transformers.distributed import DistributedConfig

import zo_fused
from zo_fused.hf.limits import check_trainer

Check = Callable[[], None]
CHECKS: dict[str, Check] = {}
OF_FOUR: dict[str, Check] = {}
SAVED = Path("saved")  # the tiny model


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


def check_of_four(function: Check) -> Check:
    OF_FOUR[function.__name__] = function
    return function


def main() -> None:
    """In each process: what went wrong goes into a file, a check each."""
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        trainers.model().save_pretrained(SAVED)
    dist.barrier()
    for name, function in (CHECKS if dist.get_world_size() == 2 else OF_FOUR).items():
        try:
            function()
        except BaseException:
            Path(f"{name}.{dist.get_rank()}").write_text(traceback.format_exc())
            os._exit(1)  # the other would wait in a collective
        Path(f"{name}.{dist.get_rank()}").write_text("")
    dist.barrier()
    dist.destroy_process_group()


METHODS: dict[str, Callable[[Any], Any]] = {
    "mezo": lambda m: zo_fused.MeZO(m, lr=1e-3, eps=1e-2),
    "adam": lambda m: zo_fused.ZOAdam(m, lr=1e-3, eps=1e-2),
    "lozo": lambda m: zo_fused.LOZO(m, lr=1e-3, eps=1e-2, rank=2, interval=2, deferred=True),
    "factored": lambda m: zo_fused.LOZO(m, lr=1e-3, eps=1e-2, rank=2, interval=3, mode="factored"),
}


def loss_of(model: Any) -> Tensor:
    loss: Tensor = model(**default_data_collator(trainers.data(4))).loss
    return loss


def train(model: Any, optimizer: Any) -> None:
    for _ in range(4):
        optimizer.step(lambda: loss_of(model))
    optimizer.flush()


def trained_alone(name: str) -> nn.Module:
    model = trainers.model()
    train(model, METHODS[name](model))
    assert not trainers.equal(trainers.weights(model), trainers.weights(trainers.model()))
    return model


def are_shards(model: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in model.parameters())


# ---- DistributedConfig --------------------------------------------------------------------------


def loaded(**sizes: int) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        SAVED, distributed_config=DistributedConfig(**sizes)
    )
    assert are_shards(model)
    return model


@check
def sharded_when_loaded() -> None:
    for name, make in METHODS.items():
        model = loaded(fsdp_size=2)
        train(model, make(model))
        check_equal(model, trained_alone(name))


@check
def tensor_parallel_when_loaded() -> None:
    """Its forward pass sums in another order: the loss, near 5, is off by 2^-21 or so, and weights
    by that over eps times lr and z in each of 4 steps. Adam divides by what is small."""
    for name in ("mezo", "lozo"):
        model = loaded(tp_size=2)
        train(model, METHODS[name](model))
        for p, q in zip(model.parameters(), trained_alone(name).parameters(), strict=True):
            assert (whole(p.detach()) - q).abs().max() < 4 * 2**-19 / 1e-2 * 1e-3 * 25


@check
def saved_by_transformers() -> None:
    model = loaded(fsdp_size=2)
    train(model, METHODS["lozo"](model))
    model.save_pretrained("tuned")
    dist.barrier()
    check_equal(AutoModelForCausalLM.from_pretrained("tuned"), trained_alone("lozo"))


@check
def a_trainer_with_a_model_sharded_when_loaded() -> None:
    """Ranks have batches of their own, as without shards."""
    zo = ("mezo", {"eps": 1e-2})
    model = loaded(fsdp_size=2)
    check_trainers(zo, {"model": model, "weight_decay": 0.1}, {"weight_decay": 0.1})


def check_trainers(zo: Any, sharded: dict[str, Any], whole_options: dict[str, Any]) -> Any:
    """A trainer whose model is sharded has the bits of one whose model is not."""
    plain = trainers.trainer(Path("plain"), zo, **whole_options)
    plain.train()
    plain.zeroth_order_optimizer.flush()
    made = trainers.trainer(Path("sharded"), zo, **sharded)
    made.train()
    made.zeroth_order_optimizer.flush()
    assert are_shards(made.model)
    check_equal(made.model, plain.model)
    check_log(made.model)
    return made


def check_log(model: nn.Module) -> None:
    """One process replays the log of the trainer with this model."""
    dist.barrier()  # it is written
    base = trainers.model()
    assert zo_fused.replay(base, "sharded/replay.jsonl") == 6
    check_equal(model, base)


# ---- accelerate ---------------------------------------------------------------------------------


def gpus() -> None:
    """accelerate, which is set up for the CPU, takes it for GPUs."""
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def accelerator(**options: Any) -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)
    gpus()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=options.pop("efficient", False),
    )
    return Accelerator(fsdp_plugin=plugin, **options)


def by_accelerate(name: str, **options: Any) -> tuple[Accelerator, Any, Any]:
    made = accelerator(**options)
    model = trainers.model()
    return (made, *made.prepare(model, METHODS[name](model)))


@check
def prepared_by_accelerate() -> None:
    """Which puts other parameters into the model and into the groups of the optimizer."""
    mesh = {"parallelism_config": ParallelismConfig(dp_shard_size=2)}
    for name, options in {
        "mezo": {},
        "adam": mesh,
        "lozo": {"efficient": True},
        "factored": {},
    }.items():
        _, model, optimizer = by_accelerate(name, **options)
        assert are_shards(model)
        train(model, optimizer.optimizer)
        check_equal(model, trained_alone(name))


@check
def states_of_accelerate() -> None:
    made, model, optimizer = by_accelerate("adam")
    train(model, optimizer.optimizer)
    made.save_state("state")
    train(model, optimizer.optimizer)
    made, again, optimizer = by_accelerate("adam")
    made.load_state("state")
    train(again, optimizer.optimizer)
    check_all_equal(model, again)


@check
def prepared_too_late() -> None:
    """Moments of whole weights would be lost."""
    made, model = accelerator(), trainers.model()
    optimizer = METHODS["adam"](model)
    optimizer.step(lambda: loss_of(model))
    model, prepared = made.prepare(model, optimizer)
    with pytest.raises(RuntimeError, match="before the first step"):
        prepared.optimizer.step(lambda: loss_of(model))


@check
def methods_that_need_whole_weights() -> None:
    made, model = accelerator(), trainers.model()
    model, optimizer = made.prepare(model, zo_fused.HiZOO(model))
    with pytest.raises(NotImplementedError, match="HiZOO can't tune parameter"):
        optimizer.optimizer.step(lambda: loss_of(model))


FSDP: dict[str, Any] = {
    "fsdp": True,
    "fsdp_config": {"fsdp_version": 2, "state_dict_type": "SHARDED_STATE_DICT"},
}


@contextmanager
def takes_gpus(*names: str) -> Iterator[None]:
    """Trainers have accelerate take the CPUs for GPUs, if one of these arguments is given; with no
    names: always."""
    usual = trainers.arguments

    @functools.wraps(usual)
    def arguments(*args: Any, **options: Any) -> Any:
        for name in [name for name in os.environ if "FSDP" in name]:  # which others have set
            del os.environ[name]
        made = usual(*args, **options)
        assert made.device.type == "cpu"  # set up
        if not names or any(map(options.get, names)):
            gpus()
        return made

    with patch.object(trainers, "arguments", arguments):
        yield


@check
def a_trainer_with_fsdp2() -> None:
    often = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 3}
    with takes_gpus("fsdp"):
        for zo in (
            ("mezo", {"eps": 1e-2}),
            ("lozo", {"deferred": True, "interval": 2}),
            ("lozo", {"mode": "factored", "interval": 4}),
        ):
            options = {"weight_decay": 0.1, **often}
            made = check_trainers(zo, {**options, **FSDP}, options)
            again = trainers.trainer(Path("sharded"), zo, weight_decay=0.1, **FSDP)
            again.train(resume_from_checkpoint="sharded/checkpoint-4")
            again.zeroth_order_optimizer.flush()
            check_all_equal(made.model, again.model)
            check_log(again.model)
        full = {"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT"}
        with pytest.raises(ValueError, match="checkpoints must be sharded"):
            trainers.trainer(Path("refused"), "mezo", fsdp=True, fsdp_config=full, **often)
        made.accelerator.state.fsdp_plugin.fsdp_version = 1
        with pytest.raises(ValueError, match="FSDP1"):
            check_trainer(made)


# ---- batches that some processes share ----------------------------------------------------------


def check_batches(model: Any, share: int, **options: Any) -> None:
    """The run of a trainer is that of one process with the batches of all, but for the order in
    which sums are rounded; and one process replays its log.

    Args:
        share: so many processes have the same batch.
    """
    with takes_gpus():
        made = trainers.trainer(Path("sharded"), ("mezo", {"eps": 1e-2}), model=model, **options)
        made.data_collator = trainers.Recording()
        made.train()
    assert are_shards(made.model)
    check_log(made.model)
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, made.data_collator.batches)
    seen = {tuple(batch["input_ids"].flatten().tolist()) for [batch, *_] in every}
    assert len(seen) == len(every) // share
    alone = trainers.model().train()
    optimizer = zo_fused.MeZO(alone, lr=1e-3, eps=1e-2, seed=42, parallel=None)

    def loss(step: int) -> Tensor:
        batches = [of_one[step] for of_one in every]
        counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
        losses = [alone(**batch).loss * count for batch, count in zip(batches, counts, strict=True)]
        return sum(losses[1:], losses[0]) / sum(counts)

    for step in range(6):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / 6)
        optimizer.step(lambda step=step: loss(step))
    check_near(made.model, alone, 6)


def check_near(model: nn.Module, alone: nn.Module, steps: int) -> None:
    """The loss, near 5, is off by 2^-21 or so, and in each step weights by that over eps times lr
    and z."""
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert (whole(p.detach()) - q).abs().max() < steps * 2**-19 / 1e-2 * 1e-3 * 5


@check
def a_trainer_with_tensor_parallel() -> None:
    """Both processes have the same batch, and each counts."""
    check_batches(loaded(tp_size=2), share=2)


@check_of_four
def a_trainer_with_fsdp2_over_tensor_parallel() -> None:
    check_batches(loaded(fsdp_size=2, tp_size=2), share=2)


@check_of_four
def a_trainer_with_copies_of_shards() -> None:
    """HSDP."""
    mesh = ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)
    check_batches(trainers.model(), share=1, **FSDP, parallelism_config=mesh)


# ---- adapters -----------------------------------------------------------------------------------


def with_adapters(model: Any) -> Any:
    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj", "v_proj", "down_proj"],
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    return peft.get_peft_model(model, config).eval()


@check
def adapters_of_a_sharded_model() -> None:
    """Only they move; the weights below are shards, too."""
    for name, make in METHODS.items():
        alone, model = with_adapters(trainers.model()), with_adapters(trainers.model())
        for layer in model.base_model.model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        for one in (alone, model):
            train(one, make(one))
        assert not trainers.equal(
            trainers.weights(alone), trainers.weights(with_adapters(trainers.model()))
        ), name
        check_equal(model, alone)


@check
def adapters_of_a_trainer_with_fsdp2() -> None:
    with takes_gpus("fsdp"):
        zo, made = ("zo-adam", {"eps": 1e-2}), []
        for folder, options in (("plain", {}), ("sharded", FSDP)):
            model = with_adapters(trainers.model())
            made.append(trainers.trainer(Path(folder), zo, model=model, **options))
            made[-1].train()
        assert are_shards(made[1].model)
        check_equal(made[1].model, made[0].model)


@check
def adapters_of_a_tensor_parallel_model() -> None:
    model, alone = with_adapters(loaded(tp_size=2)), with_adapters(trainers.model())
    with torch.no_grad():
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            q.copy_(whole(p))
    for one in (alone, model):
        train(one, METHODS["mezo"](one))
    check_near(model, alone, 4)
