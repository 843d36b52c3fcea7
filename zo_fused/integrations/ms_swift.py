"""Zeroth-order steps in ms-swift: ``--optimizer lozo`` and all other methods. Needs ms-swift.

A file for ``--external_plugins`` that imports this module registers them; `register` adds one with
arguments of its own (docs/integrations.md).
"""

from __future__ import annotations

from typing import Any

from swift.callbacks import callbacks_map
from swift.optimizers import OptimizerCallback, optimizers_map
from swift.template import Template
from transformers import TrainerCallback

from zo_fused.hf.convert import zeroth_order
from zo_fused.hf.methods import named
from zo_fused.methods.table import recipes

READ = (  # they add keys to a batch; the step is within the template's context, which see below
    "swift.trainers.seq2seq_trainer.Seq2SeqTrainer",
    "swift.trainers.trainer.Trainer",
)
TURN = "zo_fused"  # the callback's name

_chosen: dict[str, tuple[str, dict[str, Any]]] = {}


class Choice(OptimizerCallback):
    """What ``--optimizer`` names. It is made before the trainer is, so it orders `Turn`."""

    def __init__(self, args: Any, trainer: Any) -> None:
        super().__init__(args, trainer)
        if TURN not in args.callbacks:  # it may be of saved arguments
            args.callbacks = [*args.callbacks, TURN]


class Turn(TrainerCallback):
    """Turns the trainer into its zeroth-order kind as soon as it is there."""

    def __init__(self, args: Any, trainer: Any) -> None:
        self.trainer = trainer

    def on_init_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        template = type(self.trainer.template)
        if template.forward_context is not Template.forward_context:
            raise ValueError(
                f"{template.__name__} patches the model in swift's own step (forward_context), "
                "which zeroth-order steps don't take"
            )
        zeroth_order(self.trainer, _chosen[args.optimizer], read=READ)


def register(optimizer: str, method: str, **options: Any) -> None:
    """Let ``--optimizer`` name a method with arguments:

        register("lozo8", "lozo", rank=8)

    Args:
        optimizer: the new name.
        method: as ``zo-fused finetune --method``.
        options: arguments of its optimizer.

    Raises:
        ValueError: there is no such method, or the name is that of an optimizer of ms-swift.
    """
    named((method, options))
    if optimizer in optimizers_map and optimizer not in _chosen:
        raise ValueError(f"ms-swift has an optimizer {optimizer!r} of its own")
    _chosen[optimizer] = (method, options)
    optimizers_map[optimizer] = Choice


callbacks_map[TURN] = Turn
for name in recipes():
    register(name, name)
