"""TRL's supervised fine-tuning with zeroth-order steps."""

from __future__ import annotations

from trl import SFTTrainer  # type: ignore[attr-defined,unused-ignore]

from zo_fused.hf.mixin import ZOMixin


class ZOSFTTrainer(ZOMixin, SFTTrainer):
    """`trl.SFTTrainer` with zeroth-order steps: see `ZOMixin` for ``zo=``.

    Tokens and metrics of a step are counted once, in one of its evaluations. `SFTConfig` turns
    gradient checkpointing on, which has nothing to save here, and bfloat16 autocast. For example:

        args = SFTConfig("out", learning_rate=1e-6, gradient_checkpointing=False, bf16=False)
        trainer = ZOSFTTrainer(model, args, train_dataset=data, zo="lozo")
        trainer.train()
    """
