"""Zeroth-order steps in axolotl: a plugin (docs/integrations.md). Needs axolotl."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from zo_fused.hf.convert import zeroth_order

MIXINS = "axolotl.core.trainers.mixins"
READ = (  # they move frozen layers, or activations, to the CPU and back
    f"{MIXINS}.layer_offloading.LayerOffloadingMixin",
    f"{MIXINS}.activation_checkpointing.ActivationOffloadingMixin",
)


class ZOArgs(BaseModel):
    """What the configuration may say.

    Attributes:
        zo_method: as ``zo-fused finetune --method``.
        zo_options: arguments of its optimizer.
    """

    zo_method: str = "mezo"
    zo_options: dict[str, Any] | None = None


class ZOPlugin(BasePlugin):
    """``plugins: [zo_fused.integrations.axolotl.ZOPlugin]``: the trainer takes zeroth-order steps.

    `ZOMixin` says what is refused; so is ``layer_offloading``.
    """

    def get_input_args(self) -> str:
        return f"{__name__}.{ZOArgs.__name__}"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        if getattr(trainer.args, "layer_offloading", False):
            raise ValueError(
                "layer_offloading moves layers within axolotl's own step: leave it out"
            )
        zeroth_order(trainer, (cfg.zo_method, dict(cfg.zo_options or {})), read=READ)
