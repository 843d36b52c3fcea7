"""What makes a Trainer of transformers take zeroth-order steps: as little as it takes."""

from __future__ import annotations

import copy
import itertools
import logging
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_pt_utils import LengthGroupedSampler

from zo_fused.hf.limits import check_optimizer, check_trainer
from zo_fused.hf.methods import make_optimizer, named
from zo_fused.step.optimizer import ZerothOrderOptimizer
from zo_fused.sweeps.shards import is_sharded

logger = logging.getLogger("zo_fused")

REPLAY_LOG = "replay.jsonl"
COUNTERS = ("_metrics", "_total_train_tokens")  # in which trainers of TRL count as they evaluate

_Trainer: Any = object  # some class of trainers comes after the mixin


class ZOMixin(_Trainer):
    """``class MyZOTrainer(ZOMixin, MyTrainer)``: the trainer with zeroth-order steps.

    A step evaluates the trainer's own `compute_loss` over all micro-batches of an update, at
    theta + eps z and at theta - eps z, in train mode, with the same dropout. Everything else is the
    trainer's: evaluation, checkpoints, schedules, callbacks, reports. `max_grad_norm` has nothing
    to clip; ``grad_norm`` in the log is the mean of \\|g\\|.

    On several processes (torchrun, ``accelerate launch``) a step is of the batches of all of them
    (docs/parallel.md).

    A replay log (docs/replay.md) is written to ``args.output_dir``, and every checkpoint gets its
    own. A run that is resumed from a checkpoint continues that of the checkpoint, and gives the
    bits of one that was never stopped.

    Args:
        zo: the method, ``"mezo"``, or with arguments ``("lozo", {"rank": 2, "deferred": True})``;
            names are those of ``zo-fused finetune --method``. Arguments that are not given have the
            values of ``args.learning_rate``, ``args.weight_decay`` and ``args.seed``. None: the
            trainer gets ``optimizer_cls_and_kwargs=(zo_fused.LOZO, {...})``, to which the same
            applies, or ``optimizers=(zo_fused.LOZO(model), None)``.
        others: the trainer's own.

    Raises:
        TypeError, ValueError: the method or an argument of it is not what it should be, or the
            trainer needs what a zeroth-order step has not: see `zo_fused.hf.limits`.
    """

    optimizer: Any
    optimizer_cls_and_kwargs: Any
    train_mode = True  # of the model in a step; False for a class whose steps have no dropout
    _parts: tuple[Any, ...] = ()  # micro-batches that wait for the last one of their update

    def __init__(self, *args: Any, zo: Any = None, **others: Any) -> None:
        chosen = None if zo is None else named(zo)  # before what takes long
        super().__init__(*args, **others)
        check_trainer(self)
        self.choose(chosen)

    def choose(self, chosen: Any) -> None:
        """Take a method, unless it is None.

        Raises:
            ValueError: there is an optimizer.
        """
        if chosen is not None:
            if self.optimizer is not None or self.optimizer_cls_and_kwargs is not None:
                raise ValueError("the trainer has an optimizer: leave that out, or zo")
            self.optimizer_cls_and_kwargs = chosen

    @property
    def zeroth_order_optimizer(self) -> Any:
        """The optimizer itself, without what accelerate puts around it; None before training."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            self.optimizer = make_optimizer(self, self.model if model is None else model)
        if not isinstance(self.zeroth_order_optimizer, ZerothOrderOptimizer):
            kind = type(self.zeroth_order_optimizer).__name__
            raise TypeError(f"a zeroth-order trainer needs an optimizer of zo_fused, not {kind}")
        check_optimizer(self.zeroth_order_optimizer, self.model)
        return self.optimizer

    def _get_train_sampler(self, *args: Any, **others: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **others)
        if isinstance(sampler, LengthGroupedSampler) and sampler.generator is None:
            # it would draw from torch's generator, whose state at the epoch's start is not saved
            generator = sampler.generator = torch.Generator()
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            generator.manual_seed(seed)
            vars(sampler)["set_epoch"] = lambda epoch: generator.manual_seed(seed + epoch)
        return sampler

    # ---- the step -------------------------------------------------------------------------------

    def get_batch_samples(self, *args: Any, **others: Any) -> Any:
        self._parts = ()  # an update begins, even if the last one never came to its end
        return super().get_batch_samples(*args, **others)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        self._parts += (self._prepare_inputs(inputs),)
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        parts, self._parts = self._parts, ()
        model.train(self.train_mode)
        optimizer = self.zeroth_order_optimizer
        sign = -1 if optimizer.takes_rewards else 1
        counters = {name: vars(self)[name] for name in COUNTERS if name in vars(self)}

        def closure() -> Tensor:
            self.__dict__.update(copy.deepcopy(counters))  # one evaluation of a step counts
            losses = []
            for part in parts:
                with self.compute_loss_context_manager():
                    inputs = dict(part)  # compute_loss takes out labels, or puts things in
                    losses.append(
                        self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
                    )
            whole = sum(losses[1:], losses[0])
            return sign * (whole if self._is_share(num_items_in_batch) else whole / len(parts))

        return sign * optimizer.estimate(closure).to(self.args.device)

    def _is_share(self, num_items_in_batch: Any) -> bool:
        """Whether `compute_loss` gives a micro-batch's share of the update's loss, and not its own
        mean: the condition of Trainer.training_step."""
        said = getattr(self, "loss_is_scaled_for_ga", None)
        if said is not None:
            return bool(said)
        by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return by_model or self.compute_loss_func is not None

    # ---- what is reported and saved -------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **others: Any) -> None:
        grads = getattr(self.zeroth_order_optimizer, "projected_grad", None)
        if "loss" in logs and grads is not None:  # of training, with the norm of no gradients
            logs["grad_norm"] = float(grads.abs().mean())
            if skipped := self.zeroth_order_optimizer.skipped_steps:
                logs["skipped_steps"] = skipped
        super().log(logs, *args, **others)

    def _prepare_for_training(self, max_steps: Any, data: Any, checkpoint: Any) -> Any:
        if self.args.world_size > 1:  # no wrapper that has room for gradients, and sums them
            prepare = type(self.accelerator).prepare_model
            self.accelerator.prepare_model = partial(
                prepare, self.accelerator, evaluation_mode=True
            )
        if checkpoint is not None and not any(Path(checkpoint).glob("optimizer*")):
            raise ValueError(
                f"{checkpoint} has weights and no state of the optimizer (save_only_model=True): "
                "resumed, it would draw the noise of the first steps again. Load its weights with "
                "from_pretrained, and start a run with another seed"
            )
        prepared = super()._prepare_for_training(max_steps, data, checkpoint)
        groups = self.zeroth_order_optimizer.param_groups
        sharded = any(is_sharded(p) for group in groups for p in group["params"])
        if self.args.should_save or sharded:  # then all make the fingerprint, and the first writes
            self._start_log(None if checkpoint is None else Path(checkpoint, REPLAY_LOG))
        return prepared

    def _load_from_checkpoint(self, *args: Any, **others: Any) -> None:
        self._end_log()
        super()._load_from_checkpoint(*args, **others)

    def _load_best_model(self) -> None:
        self._end_log()
        super()._load_best_model()

    def _end_log(self) -> None:
        """Before weights are loaded that no step has led to."""
        if isinstance(self.zeroth_order_optimizer, ZerothOrderOptimizer):
            self.zeroth_order_optimizer.close_log()

    def _start_log(self, before: Path | None) -> None:
        optimizer, path = self.zeroth_order_optimizer, Path(self.args.output_dir, REPLAY_LOG)
        optimizer.close_log()  # of another call of train
        if before is not None and before.exists():
            if self.args.should_save:
                _keep_aside(path, before.read_bytes())
                shutil.copyfile(before, path)
            optimizer.start_log(path, resume=True)
        elif optimizer.step_count and optimizer.state:
            logger.warning("no replay log: it would lack the momentum of earlier steps")
        else:
            if self.args.should_save:
                _keep_aside(path, b"")
            optimizer.start_log(path)

    def _save_checkpoint(self, *args: Any, **others: Any) -> None:
        self.zeroth_order_optimizer.flush()  # on all ranks, of which one writes
        super()._save_checkpoint(*args, **others)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.zeroth_order_optimizer.weights.log.is_open:
            shutil.copyfile(Path(self.args.output_dir, REPLAY_LOG), Path(output_dir, REPLAY_LOG))


def _keep_aside(log: Path, content: bytes) -> None:
    """Gives a log another name, unless all its steps are in the content that takes its place: they
    may be the only record of an earlier attempt, whose checkpoint was not whole, or of another run.
    """
    old = log.read_bytes() if log.exists() else b""
    if old.count(b"\n") < 2 or content.startswith(old):  # the first line is a header
        return
    numbers = itertools.count(1)
    names = (log.with_name(f"{log.stem}.{number}{log.suffix}") for number in numbers)
    aside = next(path for path in names if not path.exists())
    log.rename(aside)
    logger.warning("%s has steps that the log of this run lacks; it is kept as %s", log, aside)
