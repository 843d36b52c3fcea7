"""The optimizer of a trainer: from a method's name, and what `TrainingArguments` say besides."""

from __future__ import annotations

from typing import Any

from zo_fused.checks import meant
from zo_fused.methods.table import arguments, recipes
from zo_fused.step.optimizer import ZerothOrderOptimizer

Chosen = tuple[type[ZerothOrderOptimizer], dict[str, Any]]


def named(zo: str | tuple[str, dict[str, Any]]) -> Chosen:
    """The class and the arguments that stand for a name of the command line's ``--method``.

    Args:
        zo: ``"mezo"``, or ``("lozo", {"rank": 2})`` with arguments of the optimizer. Its learning
            rate is that of the trainer, if it is not among them.

    Raises:
        TypeError: it is neither.
        ValueError: there is no such method.
    """
    pair = (zo, {}) if isinstance(zo, str) else zo
    if not (isinstance(pair, tuple) and [type(part) for part in pair] == [str, dict]):
        raise TypeError(f'zo must be a name or ("lozo", {{"rank": 2}}), got {zo!r}')
    name, own = pair
    known = recipes()
    if name not in known:
        near = meant(name.lower().replace("_", "-"), tuple(known))
        hint = f"did you mean {near!r}?" if near else f"there are {', '.join(known)}"
        raise ValueError(f"there is no method {name!r}; {hint}")
    kind, recipe = known[name]
    usual = {option: value for option, value in recipe.options.items() if option != "lr"}
    return kind, usual | own


def make_optimizer(trainer: Any, model: Any) -> ZerothOrderOptimizer:
    """The optimizer that ``trainer.optimizer_cls_and_kwargs`` stands for.

    Learning rate, seed, weight decay and number of steps are the trainer's, where the arguments
    don't say otherwise. As with other optimizers of a Trainer, biases and norms don't decay. Noise
    is tied to the names of the model's parameters, so a replay log fits the model.

    Raises:
        TypeError: it is no optimizer of zo_fused, or takes no such argument.
        ValueError: no method was chosen.
    """
    if trainer.optimizer_cls_and_kwargs is None:
        raise ValueError('which method? zo="mezo", or with its arguments zo=("lozo", {"rank": 2})')
    kind, own = trainer.optimizer_cls_and_kwargs
    if not (isinstance(kind, type) and issubclass(kind, ZerothOrderOptimizer)):
        raise TypeError(f"a zeroth-order trainer needs an optimizer of zo_fused, not {kind}")
    args = trainer.args
    takes = arguments(kind)
    options = {"lr": args.learning_rate, "seed": args.seed}
    if args.weight_decay:
        options["weight_decay"] = args.weight_decay
    if "total_steps" in takes and trainer.state.max_steps > 0:
        options["total_steps"] = trainer.state.max_steps
    options |= own
    optimizer = kind(model, **options)
    if options.get("weight_decay") and not kind.quantized:  # scales are no biases
        _spare(optimizer, set(trainer.get_decay_parameter_names(model)))
    return optimizer


def _spare(optimizer: ZerothOrderOptimizer, decaying: set[str]) -> None:
    """Have parameters that are not among these names in a group without weight decay. The optimizer
    has the module already, which it needs where parameters are sharded."""
    (group,) = optimizer.param_groups
    named = list(zip(group["param_names"], group["params"], strict=True))
    kept = [(name, p) for name, p in named if name in decaying]
    spared = [(name, p) for name, p in named if name not in decaying]
    if not kept:
        group["weight_decay"] = 0.0
    elif spared:
        group["param_names"], group["params"] = map(list, zip(*kept, strict=True))
        optimizer.add_param_group({"params": spared, "weight_decay": 0.0})
