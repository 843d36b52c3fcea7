"""A saved state, checked and put in the order of an optimizer's parameters."""

from __future__ import annotations

from typing import Any

from zo_fused.checks import whole
from zo_fused.noise.streams import CONTRACT_VERSION, plain_name

Group = dict[str, Any]


def check_saved(group: Group, method: str, options: str) -> None:
    """A saved group must be of this noise contract, of this kind of optimizer and of its options.

    Raises:
        ValueError: it is not.
    """
    if group.get("contract") != CONTRACT_VERSION:
        raise ValueError(
            f"the state was saved with noise contract {group.get('contract')}, "
            f"this zo_fused has {CONTRACT_VERSION}"
        )
    for name in ("seed", "step", "restores"):
        whole(f"{name} of the state", group.get(name), 0, bits=64)
    if group.get("method", method) != method:  # earlier versions: not said
        raise ValueError(f"the state is of {group['method']}, this optimizer is {method}")
    if group.get("options", options) != options:
        raise ValueError(
            f"the state was saved with {group['options']}, this optimizer has {options}"
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
