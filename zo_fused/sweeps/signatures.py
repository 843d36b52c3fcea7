"""The arguments of every sweep, in one table: names, order, shapes, defaults.

The operators' schemas are made of it, and whatever takes arguments apart, checks them or hands them
on reads it. What each sweep computes, to the bit, is in `zo_fused.sweeps.reference`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zo_fused.sweeps.numbers import RULES, TRANSFORMS, WEIGHT_DTYPES

# A sweep begins with lists of tensors, a tensor a parameter; it writes those with a !. The others
# follow in the order of the schema. A shape has a row a parameter where it says P, a column a
# direction where it says K, and one a sweep of a script where it says S. What has a ? may be None.
_TABLE = {
    "bits_": "outs! | ids[P] offsets[P] keys[P]",
    "normal_": "outs! | ids[P] offsets[P] keys[P] transform",
    "dense_": ("params! | ids[P] offsets[P] keys[K] coeffs[P,K] decay[P] rounding[1]? transform"),
    "shaped_": (
        "params! shapes | ids[P] offsets[P] keys[K] coeffs[P,K] decay[P] rounding[1]? transform"
    ),
    "dense_steps_": (
        "params! | ids[P] offsets[P] keys[K] script[S,3] coeffs[P,S,2] decay[P,S] transform"
    ),
    "moments_": (
        "params! firsts! seconds! | ids[P] offsets[P] keys[K] grads[P,K] restores[P,K] coeffs[P,6]"
        " decay[P] rule rounding[1]? transform squares[P,K]?"
    ),
    "lowrank_": "params! us vs | coeffs[P] decay[P] ids[P]? offsets[P]? rounding[1]?",
    "factor_momentum_": "moments! us | coeffs[P] decay[P]",
    "lowrank_momentum_": (
        "params! moments! us vs | coeffs[P,4] decay[P] ids[P]? offsets[P]? rounding[1]?"
    ),
}

# ids: of parameters. offsets: the index of a tensor's first element in its full parameter, which is
# not zero for a shard. keys: 64-bit stream keys in two's complement. script: which sweeps
# (`zo_fused.sweeps.script`). rounding: the key of a rounding stream, for 16-bit weights; None: to
# nearest.
_INT64 = {"ids", "offsets", "keys", "script", "rounding"}  # the others: float32
_ON_HOST = {"ids", "offsets", "script"}  # the others: where the parameters are
CHOICES = {"transform": TRANSFORMS, "rule": RULES}
_DEFAULTS = {"transform": "portable"}
# Of the first list, where it has no weights.
_DTYPES = {"bits_": torch.int64, "normal_": torch.float32, "factor_momentum_": torch.float32}

Lists = Sequence[Sequence[Tensor]]


class Argument(NamedTuple):
    """What follows the lists."""

    name: str
    shape: tuple[str, ...] = ()
    optional: bool = False  # None is possible, and the default
    dtype: torch.dtype = torch.float32
    on_host: bool = False

    @property
    def required(self) -> bool:
        return not self.optional and self.name not in _DEFAULTS

    @property
    def schema(self) -> str:
        kind = "str" if self.name in CHOICES else "Tensor?" if self.optional else "Tensor"
        if self.name in _DEFAULTS:
            return f'{kind} {self.name}="{_DEFAULTS[self.name]}"'
        return f"{kind} {self.name}" + "=None" * self.optional


class Parts(NamedTuple):
    """The arguments of a sweep, apart."""

    lists: Lists
    ids: Tensor | None
    offsets: Tensor | None
    rows: tuple[Any, ...]


@dataclass(frozen=True)
class Signature:
    """The arguments of a sweep."""

    name: str
    lists: tuple[str, ...]
    written: int  # lists, the first ones
    rest: tuple[Argument, ...]
    all: tuple[Argument, ...]  # with the lists
    rows: tuple[Argument, ...]  # the rest without ids and offsets: what changes from call to call
    required: int  # rows, the first ones
    defaults: tuple[Any, ...]  # of all rows; None where there is none
    has_streams: bool  # there are ids and offsets,
    needs_streams: bool  # and they are no option

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Of the tensors of the first list."""
        return (_DTYPES[self.name],) if self.name in _DTYPES else WEIGHT_DTYPES

    @property
    def schema(self) -> str:
        """As `torch.library.define` takes it."""
        lists = [
            f"Tensor({'abc'[i]}!)[] {label}" if i < self.written else f"Tensor[] {label}"
            for i, label in enumerate(self.lists)
        ]
        return f"({', '.join([*lists, *(argument.schema for argument in self.rest)])}) -> ()"

    def complete(self, given: tuple[Any, ...], options: Mapping[str, Any]) -> tuple[Any, ...]:
        """Rows in order, with their defaults.

        Raises:
            TypeError: there are too few, too many, or some of another name.
        """
        if not options and self.required <= len(given) <= len(self.rows):
            return given + self.defaults[len(given) :]  # what most calls come to
        return self._completed(self.rows, given, options)

    def _completed(
        self, arguments: tuple[Argument, ...], given: tuple[Any, ...], options: Mapping[str, Any]
    ) -> tuple[Any, ...]:
        names = [argument.name for argument in arguments]
        if len(given) > len(names):
            raise TypeError(f"zo_fused: {self.name} takes {', '.join(names)}: {len(given)} given")
        if unknown := options.keys() - names[len(given) :]:
            raise TypeError(f"zo_fused: {self.name} has no {min(unknown)} left to give by name")
        values = list(given)
        for argument in arguments[len(given) :]:
            if argument.required and argument.name not in options:
                raise TypeError(f"zo_fused: {self.name} needs {argument.name}")
            values.append(options.get(argument.name, _DEFAULTS.get(argument.name)))
        return tuple(values)

    def split(self, args: Sequence[Any], options: Mapping[str, Any] | None = None) -> Parts:
        """Arguments in the order of the schema, or by name; defaults may be left out."""
        values = self._completed(self.all, tuple(args), options or {})
        count = len(self.lists)
        named = dict(zip((argument.name for argument in self.rest), values[count:], strict=True))
        ids, offsets = named.pop("ids", None), named.pop("offsets", None)
        return Parts(values[:count], ids, offsets, tuple(named.values()))

    def bind(
        self, sweep: Callable[..., Any], lists: Lists, ids: Tensor | None, offsets: Tensor | None
    ) -> Callable[..., None]:
        """A function that takes all arguments, with everything but its rows."""
        streams = {"ids": ids, "offsets": offsets}

        def bound(*given: Any, **options: Any) -> None:
            rows = iter(self.complete(given, options))
            rest = [
                streams[argument.name] if argument.name in streams else next(rows)
                for argument in self.rest
            ]
            sweep(*lists, *rest)

        return bound


def _argument(text: str) -> Argument:
    match = re.fullmatch(r"(\w+)(?:\[([^]]*)\])?(\??)", text)
    assert match is not None, text
    name, shape, optional = match.groups()
    sizes = tuple(shape.split(",")) if shape else ()
    dtype = torch.int64 if name in _INT64 else torch.float32
    return Argument(name, sizes, bool(optional), dtype, name in _ON_HOST)


def _signature(name: str) -> Signature:
    lists, rest = (part.split() for part in _TABLE[name].split("|"))
    labels = tuple(label.rstrip("!") for label in lists)
    arguments = tuple(map(_argument, rest))
    rows = tuple(a for a in arguments if a.name not in ("ids", "offsets"))
    required = sum(a.required for a in rows)
    defaults = tuple(_DEFAULTS.get(a.name) for a in rows)
    streams = [a.required for a in arguments if a.name == "ids"]
    return Signature(
        name=name,
        lists=labels,
        written=sum(label.endswith("!") for label in lists),
        rest=arguments,
        all=(*map(Argument, labels), *arguments),
        rows=rows,
        required=required,
        defaults=defaults,
        has_streams=bool(streams),
        needs_streams=any(streams),
    )


SWEEPS = {name: _signature(name) for name in _TABLE}
