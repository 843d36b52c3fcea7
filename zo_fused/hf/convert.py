"""Trainers that exist already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import Trainer

from zo_fused.hf.limits import check_trainer
from zo_fused.hf.methods import named
from zo_fused.hf.mixin import ZOMixin


def zeroth_order(trainer: Any, zo: Any = None, *, read: Sequence[str] = ()) -> Any:
    """Turn a trainer into its zeroth-order kind, in place: for those that another tool makes:

        trainer = zeroth_order(trainer, ("lozo", {"rank": 2}))

    Args:
        trainer: of any class that derives from `transformers.Trainer`, before it trains.
        zo: as in `ZOMixin`.
        read: classes (``module.Class``) that you have read: what their `training_step` and
            `_prepare_inputs` do may be left out of the former, and done once a batch in the latter.
            Others that have these are refused.

    Returns:
        The trainer, whose class now is ``ZO`` + its name, with `ZOMixin` before its own.

    Raises:
        As `ZOMixin`, and TypeError for what is no trainer. The trainer then is what it was.
    """
    if not issubclass(type(trainer), Trainer):
        raise TypeError(f"zeroth_order turns a trainer of transformers, got {trainer!r:.80}")
    chosen = None if zo is None else named(zo)
    check_trainer(trainer, read)
    if isinstance(trainer, ZOMixin):
        trainer.choose(chosen)
        return trainer
    own = type(trainer)
    trainer.__class__ = _kind(own)
    try:
        trainer.choose(chosen)
    except BaseException:
        trainer.__class__ = own
        raise
    return trainer


def _kind(own: type) -> type:
    known = (kind for kind in ZOMixin.__subclasses__() if kind.__bases__ == (ZOMixin, own))
    found = next(known, None)
    return found or type(f"ZO{own.__name__}", (ZOMixin, own), {"__module__": own.__module__})
