"""The fine-tuning loop: steps, evaluations, checkpoints, and what happens on Ctrl-C."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from zo_fused.task.checkpoint import save_checkpoint
from zo_fused.task.encoding import Encoded
from zo_fused.task.errors import Interrupted, UserError, optional
from zo_fused.task.history import History
from zo_fused.task.order import batch_indices
from zo_fused.task.scoring import Scorer

SCHEDULERS = ("constant", "linear", "cosine")
SKIPPED_IN_A_ROW = 20  # then the run has diverged, or the dtype overflows


@dataclass(frozen=True)
class Plan:
    """How long and how to train."""

    steps: int
    batch_size: int
    eval_steps: int  # evaluate on dev and write a checkpoint every so many steps
    seed: int = 0
    loss: str = "classification"
    lr_scheduler: str = "constant"
    micro_batch_size: int | None = None  # examples in a forward pass; None: all of the batch


def make_scheduler(name: str, optimizer: Any, steps: int) -> Any:
    """A learning-rate schedule of transformers, at the optimizer's present step.

    It has no state of its own, so nothing of it is in a checkpoint.
    """
    transformers = optional("transformers")
    last = optimizer.step_count - 1
    if name == "linear":
        return transformers.get_linear_schedule_with_warmup(optimizer, 0, steps, last_epoch=last)
    if name == "cosine":
        return transformers.get_cosine_schedule_with_warmup(optimizer, 0, steps, last_epoch=last)
    return transformers.get_constant_schedule(optimizer, last_epoch=last)


class Finetuning:
    """A run: the optimizer's state and log, the history and the checkpoints go together.

    The model is used as it is; with ``model.eval()`` there is no dropout, as in MeZO.

    Args:
        optimizer: over the model's named parameters, fresh or with a checkpoint's state.
        data: encoded examples of "train" and perhaps of "dev" and "test".
        output: the run's directory; `replay.jsonl`, `history.jsonl` and checkpoints are written.
        settings: what a resumed run must have in common with this one; stored in checkpoints.
        resume: whether the optimizer goes on from a checkpoint of this directory.
        paired: whether the optimizer evaluates the loss of both signs at once.

    Raises:
        ValueError: the replay log to resume is not this run's.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        optimizer: Any,
        scorer: Scorer,
        data: Mapping[str, Sequence[Encoded]],
        plan: Plan,
        output: Path,
        settings: Mapping[str, Any] | None = None,
        resume: bool = False,
        paired: bool = False,
    ) -> None:
        self.forwards_per_loss = 2 if paired else 1
        self.model = model
        self.tokenizer = tokenizer
        self.optimizer = optimizer
        self.scorer = scorer
        self.data = data
        self.plan = plan
        self.output = output
        self.settings = dict(settings or {})
        optimizer.start_log(output / "replay.jsonl", resume=resume)
        self.history = History(output / "history.jsonl", optimizer.step_count if resume else None)
        self.scheduler = make_scheduler(plan.lr_scheduler, optimizer, plan.steps)
        self.skipped_in_a_row = 0

    def run(self) -> History:
        """Trains to the plan's last step.

        Raises:
            Interrupted: Ctrl-C; the weights were restored and a checkpoint saved.
            BrokenPipeError: nobody reads what is printed; a checkpoint was saved.
            UserError: `SKIPPED_IN_A_ROW` steps in a row were skipped.
        """
        tqdm = optional("tqdm").tqdm
        # None: the bar shows on a terminal only
        bar = tqdm(
            total=self.plan.steps, initial=self.optimizer.step_count, unit="step", disable=None
        )
        try:
            with bar:
                self._train(bar)
        except KeyboardInterrupt:
            path = self._checkpoint()
            raise Interrupted(f"step {self.optimizer.step_count} is saved in {path}") from None
        except BrokenPipeError:
            self._checkpoint()
            raise
        finally:
            self.optimizer.close_log()
            self.history.close()
        return self.history

    def _train(self, bar: Any) -> None:
        if self.optimizer.step_count == 0:
            self._evaluate("test", bar)
        while True:
            step = self.optimizer.step_count
            last = step >= self.plan.steps
            if last or step % self.plan.eval_steps == 0:
                self._evaluate("dev", bar)
                if 0 < step < self.plan.steps:
                    self._checkpoint()
            if last:
                break
            self._step(bar)
        self._evaluate("test", bar)
        self.optimizer.flush()  # also where there was nothing to evaluate on

    def _step(self, bar: Any) -> None:
        start = time.perf_counter()
        step = self.optimizer.step_count
        train = self.data["train"]
        indices = batch_indices(len(train), self.plan.batch_size, self.plan.seed, step)
        size = self.plan.micro_batch_size or len(indices)
        parts = [indices[at : at + size] for at in range(0, len(indices), size)]
        batches = [self.scorer.batch([train[i] for i in part], self.plan.loss) for part in parts]
        losses, sign = 0, -1 if self.optimizer.takes_rewards else 1

        def closure() -> Tensor:
            nonlocal losses
            losses += 1
            return sign * self.scorer.mean_loss(batches, self.plan.loss)

        mean = self.optimizer.step(closure)
        self.scheduler.step()
        loss, grads = sign * float(mean), self.optimizer.projected_grad.flatten().tolist()
        self.history.add(
            step=step + 1,
            loss=loss,
            projected_grad=grads[0] if len(grads) == 1 else grads,
            forwards=losses * self.forwards_per_loss,
            seconds=round(time.perf_counter() - start, 6),
        )
        finite = all(map(math.isfinite, grads))
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= SKIPPED_IN_A_ROW:
            raise UserError(
                f"stopped at step {step + 1}: {SKIPPED_IN_A_ROW} steps in a row were skipped, as "
                f"{self.optimizer.why_skipped}; lower the learning rate, or use bfloat16 or float32"
            )
        bar.set_postfix(self._postfix(loss, grads), refresh=False)
        bar.update()

    def _postfix(self, loss: float, grads: list[float]) -> dict[str, str]:
        shown = {"loss": f"{loss:.3f}", "|g|": f"{max(map(abs, grads)):.3g}"}
        accuracies = self.history.accuracies("dev")
        return {**shown, "dev": f"{accuracies[-1][1]:.3f}"} if accuracies else shown

    def _evaluate(self, split: str, bar: Any) -> None:
        """Accuracy and loss on a split that is there, unless the history has this step's."""
        step = self.optimizer.step_count
        if not self.data.get(split) or step in dict(self.history.accuracies(split)):
            return
        with self.optimizer.unperturbed():
            accuracy, loss, f1 = self.scorer.evaluate(self.data[split], self.plan.batch_size)
        entry = {"step": step, f"{split}_accuracy": accuracy, f"{split}_loss": loss}
        self.history.add(**entry if f1 is None else entry | {f"{split}_f1": f1})
        of_answers = (
            f"accuracy {accuracy:.3f}" if f1 is None else f"F1 {f1:.3f}, exact {accuracy:.3f}"
        )
        bar.write(f"step {step}: {split} {of_answers}, loss {loss:.3f}")

    def _checkpoint(self) -> Path:
        return save_checkpoint(
            self.output, self.model, self.tokenizer, self.optimizer, self.settings
        )
