"""A saved state, checked and put in the order of an optimizer's parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from zo_fused.checks import bounded, whole
from zo_fused.noise.streams import CONTRACT_VERSION, plain_name
from zo_fused.sweeps.arithmetic import BITS
from zo_fused.sweeps.shards import local

Group = dict[str, Any]


def check_form(state: Any) -> None:
    """A state must be made as those of optimizers are, with numbers that are finite.

    Raises:
        ValueError: it is not.
    """
    groups = state.get("param_groups") if isinstance(state, Mapping) else None
    kept = state.get("state") if isinstance(state, Mapping) else None
    if not (isinstance(groups, list) and isinstance(kept, Mapping)):
        raise ValueError("this is no state of an optimizer: it has no param_groups or no state")
    seen: list[Any] = []
    for number, group in enumerate(groups):
        params = group.get("params") if isinstance(group, dict) else None
        if not isinstance(params, list):
            raise ValueError(f"the state's group {number} has no list of params")
        seen += params
        names = group.get("param_names")
        texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if names is not None and not (texts and len(names) == len(params)):
            raise ValueError(f"the state's group {number} has not a name for each parameter")
    if not all(type(index) in (int, str) for index in seen) or len(set(seen)) < len(seen):
        raise ValueError("the state's params are not numbers or names, each once")
    for index, values in kept.items():
        if index in seen:
            _check_values(f"the state of parameter {index}", values)


def _check_values(what: str, values: Any) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"{what} is no dictionary")
    for name, value in values.items():
        if (
            isinstance(value, Tensor) and name != "projected_grads"
        ):  # where NaN says: there was none
            here = local(value)
            if not (here.is_meta or bool(here.isfinite().all())):
                raise ValueError(f"{what} has {name} that is not finite")
    try:
        # Adam takes powers with it, and it grows
        wanted = f"in [0, 2**{BITS - 1})"
        bounded("step", values.get("step", 0), wanted, lambda t: 0 <= t < 2 ** (BITS - 1))
    except (TypeError, ValueError) as error:
        raise ValueError(f"in {what}, {error}") from None


def check_saved(group: Group, method: str, options: str) -> None:
    """A saved group must be of this noise contract, of this kind of optimizer and of its options.

    Raises:
        ValueError: it is not.
    """
    for name in ("method", "options"):  # earlier versions have none
        if not isinstance(group.get(name, ""), str):
            raise ValueError(f"{name} of the state is no text")
    if "contract" not in group:
        raise ValueError("the state is not one of a zeroth-order optimizer of zo_fused")
    if type(group.get("contract")) is not int or group["contract"] != CONTRACT_VERSION:
        raise ValueError(
            f"the state was saved with noise contract {group.get('contract')}, "
            f"this zo_fused has {CONTRACT_VERSION}"
        )
    for name in ("seed", "step", "restores"):
        whole(f"{name} of the state", group.get(name), 0, bits=64)
    for name in ("in_place", "log"):
        if not isinstance(group.get(name, ()), list | tuple):
            raise ValueError(f"{name} of the state is no list")
    if group.get("method", method) != method:  # earlier versions: not said
        raise ValueError(f"the state is of {group['method']}, this optimizer is {method}")
    if group.get("options", options) != options:
        raise ValueError(
            f"the state was saved with {group['options']}, this optimizer has {options}"
        )


def check_complete(state: Any, hyper: Sequence[str], together: Sequence[Sequence[str]]) -> None:
    """A state of the right kind must lack nothing.

    Args:
        hyper: the hyper-parameters of its groups.
        together: names of what a parameter has all of, or nothing.

    Raises:
        ValueError: it does; says what.
    """
    for number, group in enumerate(state["param_groups"]):
        for name in hyper:
            if name not in group and name != "block":  # earlier versions have no blocks
                raise ValueError(f"the state's group {number} has no {name}")
        for index in group["params"]:
            values = state["state"].get(index, {})
            for names in together:
                has = [name for name in names if name in values]
                if missing := [name for name in names if has and name not in values]:
                    raise ValueError(
                        f"the state of parameter {index} has {has[0]} and no {missing[0]}"
                    )


def check_blocks(saved: Sequence[Group], groups: Sequence[Group]) -> None:
    """Groups that move in turn must be the same: a loaded state says of each in which block it is.

    Raises:
        ValueError: they are in other blocks.
    """
    theirs, mine = ([group.get("block", 0) for group in own] for own in (saved, groups))
    if theirs != mine:
        raise ValueError(
            f"the state is of a run whose param groups were in the blocks {theirs}, here they are "
            f"in {mine}: make the optimizer with the blocks of that run, or without block_order"
        )


def in_order(saved: list[Group], groups: list[Group]) -> list[Group]:
    """Saved groups with their parameters in the order of these, by name. The names are those of
    the state: an earlier version's may have what wrappers add, and the run's noise is theirs.

    Raises:
        ValueError: a name is on one side only.
    """
    ordered = []
    for number, (group, mine) in enumerate(zip(saved, groups, strict=False)):
        names = group.get("param_names")
        if names and mine.get("param_names"):
            index = {plain_name(name): i for i, name in enumerate(names)}
            wanted = [plain_name(name) for name in mine["param_names"]]
            if index.keys() != set(wanted):
                other = sorted(index.keys() ^ set(wanted))[0]
                raise ValueError(
                    f"the state is of other parameters: {other!r} of group {number} is on one "
                    "side only"
                )
            order = [index[name] for name in wanted]
            group = {
                **group,
                "params": [group["params"][i] for i in order],
                "param_names": [names[i] for i in order],
            }
        ordered.append(group)
    return [*ordered, *saved[len(ordered) :]]
