"""What a zeroth-order trainer refuses, before it would be wrong in silence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import transformers
from transformers import Trainer

if not hasattr(Trainer, "_prepare_for_training"):  # where the replay log is started
    raise ImportError(
        f"zo_fused.hf needs transformers 5.3 or newer; there is {transformers.__version__}"
    )


def check_trainer(trainer: Any, read: Sequence[str] = ()) -> None:
    """Look at a trainer that is, or is to become, a zeroth-order one.

    Args:
        read: classes whose own step and batches are no reason to refuse it.

    Raises:
        ValueError: its arguments or its class need what zeroth-order steps have not.
    """
    args = trainer.args
    if args.fp16:
        raise ValueError(
            "fp16=True scales losses for a backward pass, and there is none: load the model with "
            "dtype=torch.float16, or take bf16=True"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"DataParallel would copy the weights to {args.n_gpu} GPUs in every forward pass: "
            "let one be visible (CUDA_VISIBLE_DEVICES=0)"
        )
    if getattr(trainer, "is_deepspeed_enabled", False):
        raise ValueError(
            "weights that DeepSpeed shards can't be perturbed: leave it out, or take FSDP2 "
            "(docs/sharded.md)"
        )
    if getattr(trainer, "is_fsdp_enabled", False):
        _check_fsdp(args, trainer.accelerator.state.fsdp_plugin)
    _check_class(type(trainer), read)


def check_optimizer(optimizer: Any, model: Any) -> None:
    """Look at the optimizer that a trainer was given.

    Raises:
        ValueError: it is of another model than the trainer's.
    """
    if optimizer.quantized:  # scales are no parameters
        return
    own = {id(p) for p in model.parameters()}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            "the optimizer has none of the parameters of the trainer's model: it was made with "
            "another, or with a copy"
        )


def _check_fsdp(args: Any, plugin: Any) -> None:
    if plugin.fsdp_version != 2:
        raise ValueError(
            'weights that FSDP1 shards can\'t be perturbed: fsdp_config={"fsdp_version": 2} '
            "(docs/sharded.md)"
        )
    saves = args.save_strategy != "no" and not args.save_only_model
    if saves and "FULL" in str(plugin.state_dict_type):
        raise ValueError(
            "torch can't load the full state of an optimizer that keeps no tensors, so checkpoints "
            'must be sharded: fsdp_config={"state_dict_type": "SHARDED_STATE_DICT"}, or '
            'save_only_model=True (which can\'t be resumed), or save_strategy="no"'
        )


def _check_class(kind: type, read: Sequence[str]) -> None:
    for parent in kind.__mro__:
        if parent is Trainer or f"{parent.__module__}.{parent.__qualname__}" in read:
            continue
        if "_prepare_inputs" in vars(parent):
            raise ValueError(
                f"{kind.__name__} makes its batches as it goes (_prepare_inputs), and its loss "
                "need not tell how good the weights are, as that of GRPO does not: it can't be "
                "turned"
            )
        ours = parent.__module__.startswith(("zo_fused.", "transformers.", "trl."))
        if "training_step" in vars(parent) and not ours:  # TRL's offload activations, no more
            raise ValueError(
                f"{parent.__name__}.training_step would not be called: zeroth-order steps have one "
                "of their own, which evaluates compute_loss"
            )
