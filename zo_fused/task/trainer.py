"""The trainer of a fine-tuning run: `zo_fused.hf.ZOTrainer`, with a scorer's loss and evaluation, a
history, and what happens when it is stopped.
"""

from __future__ import annotations

import shutil
import signal
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor
from torch.utils.data import DataLoader

from zo_fused.hf.trainer import ZOTrainer
from zo_fused.task.console import Console, duration
from zo_fused.task.encoding import Encoded
from zo_fused.task.errors import Interrupted, UserError
from zo_fused.task.files import writing
from zo_fused.task.history import History
from zo_fused.task.models import save_model
from zo_fused.task.order import batch_indices
from zo_fused.task.plan import Plan, make_scheduler
from zo_fused.task.resuming import HISTORY, LOG, complete
from zo_fused.task.scoring import Batch, Scorer
from zo_fused.task.signals import Signals

STEPS_TO_TELL = 10  # after which the time to the end is told
SKIPPED_IN_A_ROW = 20  # then the run has diverged, or the dtype overflows


class Finetuning(ZOTrainer):
    """A run: the optimizer's state and log, the history and the checkpoints go together.

    The model is used in eval mode, without dropout, as in MeZO.

    Args:
        optimizer: over the model's named parameters, fresh or as the run left it.
        data: encoded examples of "train" and perhaps of "dev" and "test".
        output: the run's directory; `replay.jsonl`, `history.jsonl` and checkpoints are written.
        resumed: whether the run goes on, at the optimizer's step, with the history and log there.
        paired: whether the optimizer evaluates the loss of both signs at once.
        signals: that ask for the end.
        report_to: names of experiment trackers, which are told every step and evaluation.

    Raises:
        ValueError: the replay log to resume is not this run's.
    """

    train_mode = False

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        optimizer: Any,
        scorer: Scorer,
        data: Mapping[str, Sequence[Encoded]],
        plan: Plan,
        output: Path,
        resumed: bool = False,
        paired: bool = False,
        signals: Signals | None = None,
        report_to: Sequence[str] = (),
    ) -> None:
        self.words = tokenizer  # Trainer would fit the model's configuration to one of its own
        self.scorer, self.data, self.plan, self.directory = scorer, data, plan, output
        self.signals = signals or Signals()
        self.forwards_per_loss = 2 if paired else 1
        self.losses = 0
        self.saving_to = output
        self.seconds: list[float] = []  # of the first steps
        self.evaluating: dict[str, float] = {}  # seconds that a split takes
        args = transformers.TrainingArguments(
            str(output),
            per_device_train_batch_size=plan.batch_size,
            max_steps=plan.steps,
            seed=plan.seed % 2**32,  # of the global generators, which nothing here asks
            use_cpu=scorer.device.type == "cpu",
            eval_strategy="no",  # `_Flow` says when
            save_strategy="no",
            logging_strategy="no",
            logging_nan_inf_filter=False,
            report_to=list(report_to),
            disable_tqdm=True,
        )
        if args.n_gpu > 1:
            args._n_gpu = 1  # the model is on one; Trainer's own copies would take all
        use_cache = getattr(model.config, "use_cache", None)
        with _unquantized(model):
            super().__init__(
                model,
                args,
                train_dataset=data["train"],
                optimizers=(optimizer, make_scheduler(plan, optimizer)),
            )
        self.accelerator.device_placement = False  # the model is where it was asked for
        if use_cache is not None:
            model.config.use_cache = use_cache
        self.remove_callback(transformers.PrinterCallback)
        self.add_callback(_Flow(self))
        # a log without a history could not be told from one whose history was removed
        self.history = History(output / HISTORY, optimizer.step_count if resumed else None)
        try:
            optimizer.start_log(output / LOG, resume=resumed)
        except BaseException:
            self.history.close()
            raise

    def run(self) -> History:
        """Trains to the plan's last step. Whatever ends it earlier, log and history have all steps
        that were made, and the run goes on from them.

        Raises:
            Interrupted: Ctrl-C, or another signal that asks for the end.
            UserError: `SKIPPED_IN_A_ROW` steps in a row were skipped.
        """
        optimizer = self.zeroth_order_optimizer
        self.console = Console(self.plan.steps, optimizer.step_count)
        try:
            self._check_skipped()
            with self.console:
                if optimizer.step_count < self.plan.steps:
                    self.train()
                self.evaluate("dev")
                self.evaluate("test")
                optimizer.flush()  # also where there was nothing to evaluate on
        except KeyboardInterrupt as stop:
            number = getattr(stop, "number", signal.SIGINT)
            done = f"{optimizer.step_count} of {self.plan.steps} steps are done and in the log"
            raise Interrupted(done, number) from None
        finally:
            optimizer.close_log()
            self.history.close()
        return self.history

    def _init_training_state(self, *args: Any, **others: Any) -> Any:
        begins = super()._init_training_state(*args, **others)
        self.state.global_step = self.zeroth_order_optimizer.step_count
        return begins

    # ---- a step ---------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """A batch for each step of the plan that is left: the whole run is one epoch."""
        train = self.data["train"]
        return DataLoader(
            train,  # type: ignore[arg-type]  # a sequence will do
            batch_sampler=_Order(len(train), self.plan, self.zeroth_order_optimizer.step_count),
            collate_fn=self._batches,
        )

    def _batches(self, examples: Sequence[Encoded]) -> dict[str, list[Batch]]:
        size = self.plan.micro_batch_size or len(examples)
        parts = [examples[at : at + size] for at in range(0, len(examples), size)]
        return {"batches": [self.scorer.batch(part, self.plan.loss) for part in parts]}

    def get_batch_samples(self, *args: Any, **others: Any) -> Any:
        self.signals.in_step = True
        self.started, self.losses = time.perf_counter(), 0
        return super().get_batch_samples(*args, **others)

    def training_step(self, *args: Any, **others: Any) -> Tensor:
        self.loss = super().training_step(*args, **others)
        return self.loss

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Tensor:
        self.losses += 1
        return self.scorer.mean_loss(inputs["batches"], self.plan.loss)

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # which would be counted anew in each step, and told to nobody

    def after_step(self) -> None:
        """Writes the step down.

        Raises:
            UserError: `SKIPPED_IN_A_ROW` steps in a row were skipped.
        """
        optimizer = self.zeroth_order_optimizer
        step, loss = optimizer.step_count, float(self.loss)
        grads = optimizer.projected_grad.flatten().tolist()
        self.history.add(
            step=step,
            loss=loss,
            projected_grad=grads[0] if len(grads) == 1 else grads,
            forwards=self.losses * self.forwards_per_loss,
            seconds=round(time.perf_counter() - self.started, 6),
        )
        mean = sum(map(abs, grads)) / len(grads)
        self._report(loss=loss, grad_norm=mean, learning_rate=optimizer.param_groups[0]["lr"])
        self._check_skipped()
        accuracies = self.history.accuracies("dev")
        dev = f", dev {accuracies[-1][1]:.3f}" if accuracies else ""
        self.console.step(f"loss {loss:.3f}, |g| {max(map(abs, grads)):.3g}{dev}")
        if len(self.seconds) < STEPS_TO_TELL:
            self.seconds.append(time.perf_counter() - self.started)
            if len(self.seconds) == STEPS_TO_TELL and step < self.plan.steps:
                self._tell_time(step)
        self.signals.in_step = False
        self.signals.check()

    def _report(self, **logs: float) -> None:
        """Tells the trackers; not the Trainer's own history, which would grow with the run."""
        if self.args.report_to:
            self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def log(self, logs: dict[str, float], *_: Any, **__: Any) -> None:
        """The Trainer's own summary of its time and loss is told to nobody: after a new start it
        would be the loss of the rest over the steps of the whole."""

    def _check_skipped(self) -> None:
        """Raises:
        UserError: `SKIPPED_IN_A_ROW` steps in a row were skipped, also before a new start.
        """
        step, optimizer = self.history.last_step, self.zeroth_order_optimizer
        if self.history.skipped_in_a_row >= SKIPPED_IN_A_ROW:
            raise UserError(
                f"stopped at step {step}: {SKIPPED_IN_A_ROW} steps in a row were skipped, as "
                f"{optimizer.why_skipped}; lower the learning rate, or use bfloat16 or float32"
            )

    def _tell_time(self, step: int) -> None:
        """How long the rest takes, if it goes on like this; a first step is slower than others."""
        each, apart = statistics.median(self.seconds[1:]), self.plan.eval_steps
        rest = each * (self.plan.steps - step) + self.evaluating.get("test", 0.0)
        rest += (self.plan.steps // apart - step // apart) * self.evaluating.get("dev", 0.0)
        self.console.line(f"step {step}: {each:.3g} s a step, about {duration(rest)} to the end")

    # ---- evaluations and checkpoints ------------------------------------------------------------

    def is_due(self) -> bool:
        """Whether dev is evaluated after this step, and a checkpoint written before the last."""
        return self.zeroth_order_optimizer.step_count % self.plan.eval_steps == 0

    def evaluate(self, split: str = "dev", **_: Any) -> dict[str, float]:  # type: ignore[override]
        """Accuracy and loss on a split that is there, unless the history has this step's. The
        weights are at theta afterwards in any case: a sweep more or less would be another run."""
        optimizer = self.zeroth_order_optimizer
        step = optimizer.step_count
        optimizer.flush()
        if not self.data.get(split) or step in dict(self.history.accuracies(split)):
            return {}
        start = time.perf_counter()
        accuracy, loss, f1 = self.scorer.evaluate(self.data[split], self.plan.batch_size)
        self.evaluating[split] = time.perf_counter() - start
        found = {f"{split}_accuracy": accuracy, f"{split}_loss": loss}
        found |= {} if f1 is None else {f"{split}_f1": f1}
        self.history.add(step=step, **found)
        prefix = "eval" if split == "dev" else split  # by which trackers group them
        self._report(**{name.replace(split, prefix, 1): value for name, value in found.items()})
        of_answers = (
            f"accuracy {accuracy:.3f}" if f1 is None else f"F1 {f1:.3f}, exact {accuracy:.3f}"
        )
        self.console.line(f"step {step}: {split} {of_answers}, loss {loss:.3f}")
        return found

    def save_model(self, output_dir: Any = None, _internal_call: bool = False) -> None:
        save_model(self.model, self.words, Path(output_dir))

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        """Saves the run after the optimizer's last step and drops older checkpoints. A checkpoint
        appears complete or not at all."""
        final = self.directory / f"checkpoint-{self.state.global_step}"
        self.saving_to = self.directory / f"{final.name}.tmp"
        shutil.rmtree(self.saving_to, ignore_errors=True)
        self.history.sync()
        with writing(self.saving_to):
            super()._save_checkpoint(model, trial)
        complete(self.saving_to / final.name, final)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.saving_to)

    def _start_log(self, before: Path | None) -> None:
        """It is open."""

    def _move_model_to_device(self, *_: Any) -> None:
        """It is where it was asked for, which need not be the first GPU."""


class _Flow(transformers.TrainerCallback):
    """When to evaluate and save: as the plan has it, also where an earlier part of the run had
    another."""

    def __init__(self, run: Finetuning) -> None:
        self.run = run

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.run.zeroth_order_optimizer.step_count == 0:
            self.run.evaluate("test")
        if self.run.is_due():
            self.run.evaluate("dev")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.run.after_step()
        if state.global_step == state.max_steps:  # before trackers are told of the end
            self.run.evaluate("dev")
            self.run.evaluate("test")
        control.should_evaluate = self.run.is_due()
        control.should_save = self.run.is_due() and state.global_step < state.max_steps


class _Order:
    """The batches of a run from a step on: numbers of examples."""

    def __init__(self, size: int, plan: Plan, first: int) -> None:
        self.size, self.plan, self.first = size, plan, first

    def __len__(self) -> int:
        return self.plan.steps  # of the run, as Trainer counts them

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first, self.plan.steps):
            yield batch_indices(self.size, self.plan.batch_size, self.plan.seed, step)


@contextmanager
def _unquantized(model: Any) -> Iterator[None]:
    """While a Trainer is made, which refuses to tune a quantized model without an adapter: with
    gradients it couldn't."""
    quantized = getattr(model, "is_quantized", False)
    if quantized:
        model.is_quantized = False
    try:
        yield
    finally:
        if quantized:
            model.is_quantized = True
