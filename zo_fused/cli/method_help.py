"""What ``zo-fused finetune --help`` says of the options of methods.

Of all methods: who takes an option, and its default where a few names tell it. After ``--method
NAME``: the options of that method with its defaults, and no others.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping
from typing import Any

from zo_fused.cli.defaults import BY_PEFT, EMBEDDED_BY_METHOD, METHOD
from zo_fused.cli.method_options import OPTIONS, UNSET, by_method, in_place
from zo_fused.cli.parser import shown

HINT = "--method NAME --help, in this order, shows what a method takes, with its own defaults"
_NAMED = 8  # methods at the most that a help text counts up


def add_method_options(group: Any, **choices: Any) -> None:
    """Adds ``--method`` and the options of all methods.

    Args:
        choices: arguments of ``add_argument`` for the names.
    """
    actions: dict[str, argparse.Action] = {}

    class Chosen(argparse.Action):
        """Keeps the name; a help text asked for after it is of this method."""

        def __call__(
            self,
            parser: argparse.ArgumentParser,
            namespace: argparse.Namespace,
            values: Any,
            option_string: str | None = None,
        ) -> None:
            setattr(namespace, self.dest, values)
            for name, action in actions.items():
                action.help = of_one(name, values)

    group.add_argument("--method", action=Chosen, **choices, help=f"optimizer (default: {METHOD})")
    for name, option in OPTIONS.items():
        flag = f"--{name.replace('_', '-')}"
        actions[name] = group.add_argument(flag, **{**option, "help": of_all(name)})


def of_all(option: str) -> str:
    """The help text of an option among those of all methods."""
    values = {method: own[option] for method, own in by_method().items() if option in own}
    takers = f"{', '.join(values)}: " if len(values) <= _NAMED else ""
    return f"{takers}{OPTIONS[option]['help']} (default: {_defaults(option, values)})"


def of_one(option: str, method: str) -> str:
    """The help text of an option of a method; of others, what hides it."""
    own = by_method()[method]
    if option not in own:
        return argparse.SUPPRESS
    usual = _word(option, own[option])
    told = [f"default: {usual}"]
    embedded = _word(option, EMBEDDED_BY_METHOD.get(method, {}).get(option, own[option]))
    if embedded != usual:
        told.append(f"on the embedded model: {embedded}")
    if (option, usual) == ("schedule", "factored"):
        told.append(f"with --peft or --one-sided: {in_place(method)}")
    if "quantize" not in own:  # such a method tunes no adapter
        adapters = [(peft, of[option]) for peft, of in BY_PEFT.items() if option in of]
        told += [f"--peft {peft}: {shown(value)}" for peft, value in adapters]
    return f"{OPTIONS[option]['help']} ({'; '.join(told)})"


def _defaults(option: str, values: Mapping[str, Any]) -> str:
    """The commonest, and who has another; or that of the default method, where many have."""
    words = {method: _word(option, value) for method, value in values.items()}
    usual = Counter(words.values()).most_common(1)[0][0]
    others: dict[str, list[str]] = {}
    for method, word in words.items():
        if word != usual:
            others.setdefault(word, []).append(method)
    if sum(map(len, others.values())) > _NAMED:
        return f"by method; {METHOD}: {words[METHOD]}"
    return "; ".join([usual, *(f"{', '.join(who)}: {word}" for word, who in others.items())])


def _word(option: str, value: Any) -> str:
    if value is None:
        return UNSET[option]
    if option == "interval" and value >= 10**9:
        return UNSET[option]
    return shown(value)
