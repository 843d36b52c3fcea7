"""`ZOTrainer` takes the steps of a plain loop, and resumes as if it was never stopped."""

from __future__ import annotations

import importlib
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from support import trainers
from support.trainers import Recording, arguments, equal, trainer, weights
from torch import nn
from transformers import Trainer, TrainerCallback

import zo_fused
from zo_fused.hf import ZOMixin, ZOTrainer, zeroth_order
from zo_fused.methods.table import recipes

MODES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("mezo", {"eps": 1e-2}),
    "deferred": ("lozo", {"deferred": True, "eps": 1e-2, "interval": 4}),
    "factored": ("lozo", {"mode": "factored", "eps": 1e-2, "interval": 4}),
}
STATES: dict[str, tuple[str, dict[str, Any]]] = {
    "momentum": ("lozo-m", {"deferred": True, "interval": 4}),
    "adam": ("zo-adam", {"eps": 1e-2}),
    "queries": ("mezo", {"queries": 2, "one_sided": True}),
    "paired": ("lozo", {"mode": "factored", "paired": True}),
    "activations": ("agzo", {"refresh": 2}),
}


def loop(zo: tuple[str, dict[str, Any]], batches: list[Any], **more: Any) -> nn.Module:
    """The model after steps of a plain loop."""
    kind, recipe = recipes()[zo[0]]
    model = trainers.model().train()
    opt = kind(model, **{**recipe.options, "lr": 1e-3, "seed": 42, **zo[1], **more})
    sign = -1 if opt.takes_rewards else 1
    for batch in batches:
        count = batch["labels"][:, 1:].ne(-100).sum()
        opt.step(lambda batch=batch, n=count: sign * model(**batch, num_items_in_batch=n).loss)
    return model


@pytest.mark.parametrize(
    "zo", [*MODES.values(), ("es", {"population": 2})], ids=[*MODES, "rewards"]
)
def test_steps_are_those_of_a_loop(zo: Any, tmp_path: Path, sweeps: list[str]) -> None:
    recording = Recording()
    made = trainer(tmp_path, zo, data_collator=recording, lr_scheduler_type="constant")
    made.train()
    by_trainer = len(sweeps)
    expected = loop(zo, recording.batches[:6])
    assert len(sweeps) == 2 * by_trainer > 0  # nothing of the Trainer looks at weights in between
    assert equal(weights(made.model), weights(expected))
    assert not equal(weights(expected), weights(trainers.model()))
    assert all(p.grad is None for p in made.model.parameters())
    assert made.state.log_history[0]["loss"] > 0  # also where the optimizer sees rewards


@pytest.mark.parametrize("zo", [*MODES.values(), *STATES.values()], ids=[*MODES, *STATES])
def test_a_resumed_run_has_the_same_bits(zo: Any, tmp_path: Path) -> None:
    often = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 3, "eval_steps": 3}
    whole = trainer(tmp_path / "whole", zo, **often, weight_decay=0.1)
    whole.train()
    resumed = trainer(tmp_path / "resumed", zo, **often, weight_decay=0.1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
    assert equal(weights(whole.model), weights(resumed.model))
    at_the_end = tmp_path / "whole/checkpoint-6/model.safetensors"
    saved = safetensors.torch.load_file(at_the_end)
    assert equal(saved, weights(whole.model))

    def told(run: Any) -> list[Any]:
        timeless = ("loss", "grad_norm", "learning_rate", "eval_loss", "step")
        history = [entry for entry in run.state.log_history if "train_loss" not in entry]
        return [{name: e[name] for name in timeless if name in e} for e in history]

    assert told(whole) == told(resumed)
    for output in ("whole", "resumed", "resumed/checkpoint-6"):
        replayed = trainers.model()
        assert zo_fused.replay(replayed, tmp_path / output / "replay.jsonl") == 6
        assert equal(weights(replayed), weights(whole.model))
    base = trainers.model()
    assert zo_fused.replay(base, tmp_path / "whole/checkpoint-3/replay.jsonl") == 3


def test_a_log_that_is_ahead_of_the_checkpoint_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It may be all that is left of steps that took days."""
    zo, every = MODES["plain"], {"save_strategy": "steps", "save_steps": 3}
    trainer(tmp_path, zo, **every).train()
    log, before = tmp_path / "replay.jsonl", tmp_path / "checkpoint-3"
    ahead = log.read_bytes()
    with caplog.at_level(logging.WARNING, "zo_fused"):
        trainer(tmp_path, zo, **every).train(resume_from_checkpoint=str(before))
    assert f"{log} has steps that the log of this run lacks; it is kept as" in caplog.text
    assert log.read_bytes() == (tmp_path / "replay.1.jsonl").read_bytes() == ahead
    shutil.copyfile(before / "replay.jsonl", log)
    trainer(tmp_path, zo, **every).train(resume_from_checkpoint=str(before))
    assert len(list(tmp_path.glob("replay.*.jsonl"))) == 1


def test_weights_alone_are_not_resumed(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 3, "save_only_model": True}
    trainer(tmp_path, "mezo", **options).train()
    with pytest.raises(ValueError, match="checkpoint-3 has weights and no state of the optimizer"):
        trainer(tmp_path, "mezo", **options).train(str(tmp_path / "checkpoint-3"))


def test_weights_that_are_saved_by_hand_are_at_theta(tmp_path: Path) -> None:
    made = trainer(tmp_path, MODES["deferred"])
    made.train()
    assert made.zeroth_order_optimizer.weights.ahead
    made.save_model(str(tmp_path / "saved"))
    saved = safetensors.torch.load_file(tmp_path / "saved/model.safetensors")
    replayed = trainers.model()
    zo_fused.replay(replayed, tmp_path / "replay.jsonl")
    assert equal(saved, weights(replayed))


# ---- accumulation -------------------------------------------------------------------------------


class Scaled(ZOTrainer):
    """Whose `compute_loss` is the mean of a micro-batch, whatever it is told."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **others: Any) -> Any:
        others.pop("num_items_in_batch", None)
        return super().compute_loss(model, inputs, *args, **others)


@pytest.mark.parametrize("kind", [ZOTrainer, Scaled])
def test_micro_batches_are_one_batch(kind: Any, tmp_path: Path) -> None:
    """12 examples in batches of 8: the last update of an epoch has half as many. The labels of an
    example are as many as those of the next where means of micro-batches are compared."""
    even = [{**one, "labels": one["input_ids"]} for one in trainers.data()]
    dataset = even if kind is Scaled else trainers.data()
    runs = []
    for size, parts in ((8, 1), (2, 4)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts}
        zo = ("mezo", {"eps": 1e-2})
        run = trainer(tmp_path / f"{parts}", zo, kind, train_dataset=dataset, **sizes)
        forwards = []
        run.model.register_forward_hook(lambda *_, forwards=forwards: forwards.append(1))
        run.train()
        assert run.state.global_step == run.zeroth_order_optimizer.step_count == 6
        assert len(forwards) == 2 * (6 if parts == 1 else 3 * 4 + 3 * 2)
        runs.append(run)
    losses = [[entry["loss"] for entry in run.state.log_history[:6]] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for one, other in zip(*(run.model.parameters() for run in runs), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def test_an_update_that_is_broken_off_leaves_no_micro_batch(tmp_path: Path) -> None:
    waiting: list[int] = []

    class Breaks(TrainerCallback):
        """In the middle of the first update."""

        def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_epoch_stop = not waiting
            waiting.append(len(made._parts))

    sizes = {"gradient_accumulation_steps": 2, "max_steps": 4}
    made = trainer(tmp_path, "mezo", callbacks=[Breaks()], **sizes)
    made.train()
    assert waiting == [1] * len(waiting)
    assert len(waiting) > made.state.global_step > 0


# ---- what the optimizer gets --------------------------------------------------------------------


def test_all_ways_to_name_a_method_give_one_optimizer(tmp_path: Path) -> None:
    options = {"rank": 3, "interval": 4}
    runs = [
        trainer(tmp_path, ("lozo", options)),
        trainer(tmp_path, optimizer_cls_and_kwargs=(zo_fused.LOZO, options)),
        zeroth_order(trainer(tmp_path, kind=Trainer), ("lozo", options)),
    ]
    tuned = trainers.model()
    own = zo_fused.LOZO(tuned, lr=1e-3, seed=42, **options)
    runs.append(trainer(tmp_path, model=tuned, optimizers=(own, None)))
    for run in runs:
        run.train()
        assert equal(weights(run.model), weights(runs[0].model))
        assert run.state.log_history[0]["learning_rate"] == 1e-3


def test_arguments_of_the_trainer_reach_the_optimizer_unless_it_has_its_own(tmp_path: Path) -> None:
    of_args = {"learning_rate": 2e-3, "seed": 7, "weight_decay": 0.1}
    opt = trainer(tmp_path, "mezo", **of_args).create_optimizer()
    assert (opt.seed, [group["lr"] for group in opt.param_groups]) == (7, [2e-3, 2e-3])
    own = {"lr": 3e-3, "seed": 8, "weight_decay": 0.2}
    opt = trainer(tmp_path, ("mezo-gv", own), **of_args).create_optimizer()
    assert (opt.seed, [group["lr"] for group in opt.param_groups]) == (8, [3e-3, 3e-3])
    assert [group["weight_decay"] for group in opt.param_groups] == [0.2, 0.0]
    assert trainer(tmp_path, "mezo-gv").create_optimizer().param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize("zo", MODES.values(), ids=list(MODES))
def test_weight_decay_is_for_matrices_alone(zo: Any, tmp_path: Path) -> None:
    """With a loss that is constant, nothing else moves weights."""
    before = weights(trainers.model())
    made = trainer(
        tmp_path,
        zo,
        weight_decay=0.5,
        lr_scheduler_type="constant",
        max_steps=5,  # a window of factored steps, and one
        compute_loss_func=lambda outputs, labels, num_items_in_batch: torch.tensor(1.0),
    )
    made.train()
    names = [name for group in made.optimizer.param_groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in made.model.named_parameters())
    decayed = made.get_decay_parameter_names(made.model)
    assert 0 < len(decayed) < len(names)
    for name, after in weights(made.model).items():
        rate = (1 - 1e-3 * 0.5) ** 5 if name in decayed else 1.0
        torch.testing.assert_close(after, rate * before[name], rtol=1e-6, atol=1e-6)


# ---- what it refuses ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("fp16", True, "fp16=True scales losses"),
        ("_n_gpu", 2, "to 2 GPUs in every forward pass"),
    ],
)
def test_arguments_that_it_refuses(name: str, value: Any, message: str, tmp_path: Path) -> None:
    plain = trainer(tmp_path, kind=Trainer)
    setattr(plain.args, name, value)
    with pytest.raises(ValueError, match=message):
        zeroth_order(plain, "mezo")
    assert type(plain) is Trainer
    args = arguments(tmp_path)
    setattr(args, name, value)
    with pytest.raises(ValueError, match=message if name != "fp16" else "fp16"):
        ZOTrainer(trainers.model(), args, zo="mezo")


def test_classes_that_it_refuses(tmp_path: Path) -> None:
    class Generates(Trainer):
        def _prepare_inputs(self, inputs: Any) -> Any:
            return inputs

    class Steps(Trainer):
        def training_step(self, *args: Any) -> Any:
            return super().training_step(*args)

    for kind, message in ((Generates, "GRPO"), (Steps, "Steps.training_step")):
        with pytest.raises(ValueError, match=message):
            zeroth_order(trainer(tmp_path, kind=kind), "mezo")
        name = f"{kind.__module__}.{kind.__qualname__}"
        assert type(zeroth_order(trainer(tmp_path, kind=kind), "mezo", read=[name])) is not kind


def test_old_versions_that_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    from zo_fused.hf import limits

    monkeypatch.delattr(Trainer, "_prepare_for_training")
    with pytest.raises(ImportError, match=r"needs transformers 5\.3 or newer"):
        importlib.reload(limits)


def test_methods_that_it_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'lozo'"):
        trainer(tmp_path, "lozzo")
    with pytest.raises(ValueError, match="did you mean 'zo-adam'"):
        trainer(tmp_path, "ZO_Adam")
    for wrong in (zo_fused.LOZO, ("lozo",), ("lozo", {}, 2), ("lozo", 2)):
        with pytest.raises(TypeError, match="zo must be a name or"):
            trainer(tmp_path, wrong)
    with pytest.raises(TypeError, match="rang"):
        trainer(tmp_path, ("lozo", {"rang": 2})).train()
    with pytest.raises(ValueError, match="which method"):
        trainer(tmp_path).train()
    with pytest.raises(ValueError, match="has an optimizer"):
        trainer(tmp_path, "mezo", optimizer_cls_and_kwargs=(zo_fused.LOZO, {}))
    first_order = torch.optim.SGD(trainers.model().parameters(), lr=1e-3)
    for way in (
        {"optimizers": (first_order, None)},
        {"optimizer_cls_and_kwargs": (type(first_order), {})},
    ):
        with pytest.raises(TypeError, match="an optimizer of zo_fused, not"):
            trainer(tmp_path, **way).train()
    of_a_copy = zo_fused.MeZO(trainers.model(), lr=1e-3)
    with pytest.raises(ValueError, match="none of the parameters of the trainer's model"):
        trainer(tmp_path, optimizers=(of_a_copy, None)).train()


def test_what_is_no_trainer_is_not_turned() -> None:
    with pytest.raises(TypeError, match="zeroth_order turns a trainer of transformers, got Lin"):
        zeroth_order(torch.nn.Linear(1, 1), "mezo")


# ---- trainers that exist ------------------------------------------------------------------------


def test_a_trainer_is_turned_once(tmp_path: Path) -> None:
    class Mine(Trainer):
        pass

    one, other = (zeroth_order(trainer(tmp_path, kind=Mine), "mezo") for _ in range(2))
    assert type(one) is type(other)
    assert type(one).__name__ == "ZOMine"
    assert isinstance(one, ZOMixin)
    assert isinstance(one, Mine)
    assert zeroth_order(one) is one
    assert type(zeroth_order(trainer(tmp_path, kind=Trainer))) is ZOTrainer
    with pytest.raises(ValueError, match="has an optimizer"):
        zeroth_order(one, "lozo")
    chosen = trainer(tmp_path, kind=Trainer, optimizer_cls_and_kwargs=(zo_fused.LOZO, {}))
    with pytest.raises(ValueError, match="has an optimizer"):
        zeroth_order(chosen, "lozo")
    assert type(chosen) is Trainer
