"""The Trainer of transformers with zeroth-order steps."""

from __future__ import annotations

from transformers import Trainer

from zo_fused.hf.mixin import ZOMixin


class ZOTrainer(ZOMixin, Trainer):
    """`transformers.Trainer` with zeroth-order steps: see `ZOMixin` for ``zo=``.

    For example:

        args = TrainingArguments("out", learning_rate=1e-6, max_steps=1000)
        trainer = ZOTrainer(model, args, train_dataset=data, zo=("lozo", {"deferred": True}))
        trainer.train()
    """
