"""From param groups to buckets: the trainable parameters of one device, as the sweeps take them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from zo_fused.noise.keys import on_host
from zo_fused.noise.streams import parameter_id
from zo_fused.recording import capturing
from zo_fused.step.sharded import Rows
from zo_fused.step.vectors import Vector, constant, filled, vector
from zo_fused.sweeps.arguments import not_dense, not_in_memory, overlap
from zo_fused.sweeps.arithmetic import power, powers, squares
from zo_fused.sweeps.conversions import int64_tensor
from zo_fused.sweeps.numbers import WEIGHT_DTYPES
from zo_fused.sweeps.prepared import Prepared, prepare
from zo_fused.sweeps.shards import is_sharded, local, locals_of

Made = TypeVar("Made")


@dataclass(eq=False)
class Bucket:
    """Parameters on one device, with a row for each in every table."""

    device: torch.device
    fixed: list[dict[str, Any]]  # per group, hyper-parameters that stay while the bucket is in use
    beside: bool = False  # matrices whose changes a direction keeps beside them
    block: int = 0  # of its groups, where blocks of parameters are perturbed one at a time
    owners: list[Tensor] = field(default_factory=list)  # parameters of the optimizer
    params: list[Tensor] = field(default_factory=list)  # them, or what there is here of shards
    rows: Rows | None = None  # if there are shards
    owner_ids: list[int] = field(default_factory=list)
    owner_groups: list[int] = field(default_factory=list)  # indices of their param groups
    group_of: list[int] = field(default_factory=list)  # index of the param group, a parameter
    in_use: list[int] = field(default_factory=list)  # these indices, each once
    id_list: list[int] = field(default_factory=list)
    ids: Tensor = field(default_factory=lambda: int64_tensor([]))
    offsets: Tensor = field(default_factory=lambda: int64_tensor([]))
    group_index: Tensor = field(default_factory=lambda: int64_tensor([]))
    _made: dict[Any, Any] = field(default_factory=dict)
    _prepared: list[Prepared] = field(default_factory=list)
    _constants: OrderedDict[tuple[float, ...], Vector] = field(default_factory=OrderedDict)
    _read_by_graphs: dict[tuple[float, ...], Vector] = field(default_factory=dict)

    def constant(self, per_group: Sequence[float]) -> Vector:
        """Numbers of the groups as a vector. Not to be changed: it is kept for the next call, which
        then copies nothing to the device."""
        key = (True, *per_group)
        return self._kept(key, per_group, self.group_of, self.group_index)

    def numbers(self, values: Sequence[float]) -> Tensor:
        """Numbers of the host, float64 [len(values)]. Kept as `constant`s are."""
        return self._kept((False, *values), values, range(len(values)), slice(None))

    def _kept(
        self, key: tuple[float, ...], values: Sequence[float], order: Sequence[int], index: Any
    ) -> Vector:
        """Values in an order, which an index has on the device.

        In a step that is captured, one that exists stays as long as the bucket, for graphs read it.
        A new one is filled in the graph: its numbers are arguments of kernels, and until the first
        replay its memory has none, so nobody else may find it."""
        if capturing():
            known = self._read_by_graphs.get(key)
            if known is None and key in self._constants:
                known = self._read_by_graphs[key] = self._constants[key]
            if known is not None:
                return known
            return torch.stack([filled(number, self.device) for number in values])[index]
        if key in self._constants:
            self._constants.move_to_end(key)
        else:
            self._constants[key] = constant([values[i] for i in order], self.device)
            if len(self._constants) > 32:
                self._constants.popitem(last=False)
        return self._constants[key]

    @property
    def turn(self) -> Tensor:
        """``1 + i``, complex128 [1]: see `zo_fused.step.estimates`."""
        turn = partial(torch.full, (1,), 1 + 1j, dtype=torch.complex128, device=self.device)
        return self.once("turn", turn)

    def hyper(
        self, param_groups: list[dict[str, Any]], name: str, default: float | None = None
    ) -> Vector:
        """A hyper-parameter as a vector; the host waits for nothing, also where it is a tensor on
        the device. Not to be changed.

        Args:
            default: for methods that have no such hyper-parameter.
        """
        values: list[Any] = [group.get(name, default) for group in param_groups]
        on_device = list(map(_on_device, values))
        if any(on_device):
            there = [
                v.to(self.device, torch.float64).reshape(())
                if on
                else filled(float(v), self.device)
                for v, on in zip(values, on_device, strict=True)
            ]
            return torch.stack(there)[self.group_index]
        return self.constant([float(v) for v in values])

    def shares(
        self, grads: Sequence[Tensor], eps: Sequence[float], queries: int, scale: Vector | None
    ) -> list[Vector]:
        """Projected gradients [] of a step's queries as vectors: divided by their number, and
        scaled. A group with its own eps has its own estimate from the same losses."""
        share = self.constant([1 / radius * eps[0] for radius in eps])
        vectors = [grad.expand(len(self.params)) for grad in grads]
        if share is not self.ones:
            vectors = [grad * share for grad in vectors]
        if queries > 1:
            # by a number of the host, a GPU would multiply with its reciprocal
            vectors = [grad / self.numbers([queries]) for grad in vectors]
        return vectors if scale is None else [grad * scale for grad in vectors]

    def decay(self, param_groups: list[dict[str, Any]]) -> Vector:
        """``1 - lr * weight_decay``. Not to be changed."""
        pairs: list[Any] = [(g["lr"], g.get("weight_decay", 0.0)) for g in param_groups]
        if not any(decay for _, decay in pairs):
            return self.ones
        if any(_on_device(lr) for lr, _ in pairs):
            return 1 - self.hyper(param_groups, "lr") * self.hyper(param_groups, "weight_decay")
        return self.constant([1 - float(lr) * decay for lr, decay in pairs])

    @property
    def zeros(self) -> Vector:
        """A vector of zeros, not to be changed."""
        return self.constant([0.0] * len(self.fixed))

    @property
    def ones(self) -> Vector:
        """A vector of ones, not to be changed."""
        return self.constant([1.0] * len(self.fixed))

    def has(self, per_group: Sequence[float]) -> bool:
        """Whether one of its groups has a number other than zero."""
        return any(per_group[g] for g in self.in_use)

    def prepared(
        self, name: str, *lists: list[Tensor], key: Any = None, params: list[Tensor] | None = None
    ) -> Callable[..., None]:
        """The sweep of that name over the parameters (or tensors like them) and further lists of
        tensors, ready to be called with its rows, which are not checked; made once per key."""
        made = [self.params if params is None else params, *lists]
        return self.once((name, key), lambda: self._prepare(name, made, self.ids, self.offsets))

    def fill(
        self, outs: list[Tensor], rows: list[int], key: Any, along: str = "rows"
    ) -> Callable[..., None]:
        """Fills tensors with the normals of the parameters in these rows; called with a key each.
        Made once per key.

        Args:
            along: of shards: "rows", whether a tensor has a row for each row of its matrix, or
                "columns", for each column; "vectors": vectors have, and matrices are none;
                "whole": a tensor is of the whole parameter.
        """
        return self.once(("normal_", key), lambda: self._filling(outs, rows, along))

    def _filling(self, outs: list[Tensor], rows: list[int], along: str) -> Callable[..., None]:
        if self.rows is None or along == "whole":
            return self._prepare("normal_", [outs], self.ids[rows], int64_tensor([0] * len(rows)))
        parts, number, firsts = self.rows.of_matrices(outs, rows, along)
        sweep = self._prepare("normal_", [parts], self.ids[rows][number], int64_tensor(firsts))
        return lambda keys, **options: sweep(keys[number], **options)

    def owner_of(self, row: int) -> Tensor:
        """Whose part sweeps over matrices have in a row."""
        return self.owners[row if self.rows is None else self.rows.row[row]]

    def like(self, tensors: list[Tensor]) -> list[Tensor]:
        """Tensors like the owners, as sweeps take them beside the parameters."""
        return tensors if self.rows is None else self.rows.like(tensors)

    def row_of(self, owner: int) -> int | None:
        """Where sweeps over matrices have an owner; None: nothing of it is here."""
        if self.rows is None:
            return owner
        found = self.rows.row
        rows = self.once("row of", lambda: {o: row for row, o in enumerate(found)})
        return rows.get(owner)

    def powers(self, bases: Sequence[float], exponents: Vector) -> Vector:
        """``base^exponent`` with a base a group, the same bits on every device."""
        if on_host(self.device):
            made = exponents
            for t in exponents.unique().tolist():  # most often one
                of_groups = vector([power(base, int(t)) for base in bases], self.device)
                made = torch.where(exponents == t, of_groups[self.group_index], made)
            return made
        table = self.numbers([x for base in bases for x in squares(base)])
        return powers(table.view(len(bases), -1)[self.group_index].T, exponents)

    def spread(self, per_owner: Vector) -> Vector:
        """Numbers of the owners as a vector."""
        if self.rows is None:
            return per_owner
        row = self.rows.row
        return per_owner[self.once("owner", lambda: int64_tensor(row, self.device))]

    def lay_out(self, labels: Sequence[str], matrices: bool) -> None:
        """The owners are known, and there is a group and an id for each: make the rows."""
        self.owner_ids, self.owner_groups = list(self.id_list), list(self.group_of)
        self.in_use = sorted(set(self.group_of))
        self.params, offsets = self.owners, [0] * len(self.owners)
        if any(map(is_sharded, self.owners)):
            self.rows = Rows(self.owners, labels, matrices, every=self.beside)
            self.params, offsets = self.rows.params, self.rows.offsets
            self.group_of = [self.group_of[i] for i in self.rows.row]
            self.id_list = [self.id_list[i] for i in self.rows.row]
        self.ids, self.offsets = int64_tensor(self.id_list), int64_tensor(offsets)
        self.group_index = int64_tensor(self.group_of, self.device)

    def _prepare(self, *arguments: Any) -> Callable[..., None]:
        self._prepared.append(prepare(*arguments))
        return self._prepared[-1].run

    def look_again(self) -> None:
        """The parameters may have moved (``p.data = ...``): sweeps follow them."""
        for prepared in self._prepared:
            prepared.look_again()

    def once(self, key: Any, make: Callable[[], Made]) -> Made:
        """What `make` returned when it was first called under this key."""
        if key not in self._made:
            self._made[key] = make()
        made: Made = self._made[key]
        return made


def _on_device(value: Any) -> bool:
    """Whether it is a number that the host would have to wait for."""
    return isinstance(value, Tensor) and value.device.type != "cpu"


requires_grad: Callable[[Tensor], bool] = attrgetter("requires_grad")


def signature(
    param_groups: list[dict[str, Any]],
    names: Sequence[str],
    moves: Callable[[Tensor], bool] = requires_grad,
) -> tuple[Any, ...]:
    """What must not change for buckets to stay valid. Made once a step, in loops of C.

    Args:
        names: hyper-parameters that buckets hold on to.
        moves: whether a parameter is tuned.
    """
    params = list(chain.from_iterable(group["params"] for group in param_groups))
    try:
        addresses = list(map(torch.Tensor.data_ptr, locals_of(params)))
    except (RuntimeError, ValueError):
        _refuse_without_memory(param_groups)
        raise
    return (
        list(map(id, params)),
        addresses,
        list(map(moves, params)),
        [group[name] for group in param_groups for name in names],
        [tuple(group.get("param_names") or ()) for group in param_groups],
    )


def parameter_ids(param_groups: list[dict[str, Any]]) -> list[int]:
    """The id of every parameter in optimizer order: from its name if known, else its position.

    Raises:
        ValueError: two parameters have the same id.
    """
    ids: list[int] = []
    for group in param_groups:
        names = group.get("param_names") or [None] * len(group["params"])
        for name in names:
            ids.append(len(ids) if name is None else parameter_id(name))
    if len(set(ids)) != len(ids):
        twice = next(
            label
            for label, id_ in zip(labels(param_groups), ids, strict=True)
            if ids.count(id_) > 1
        )
        raise ValueError(
            f"zo_fused: two parameters have the same name, {twice}, so their noise would agree "
            "(names leave out what wrappers add: `_orig_mod.`, and `module.` at the front)"
        )
    return ids


def labels(param_groups: list[dict[str, Any]]) -> list[str]:
    """What to call every parameter, in optimizer order."""
    names: list[Any] = []
    for group in param_groups:
        names += group.get("param_names") or range(len(names), len(names) + len(group["params"]))
    return [repr(name) for name in names]


def _refuse_without_memory(param_groups: list[dict[str, Any]]) -> None:
    params = chain.from_iterable(group["params"] for group in param_groups)
    for label, p in zip(labels(param_groups), params, strict=True):
        if nn.parameter.is_lazy(p):
            raise ValueError(
                f"zo_fused: parameter {label} is lazy and not initialized yet: run the model once, "
                "then make the optimizer"
            )
        _refuse_unsupported(p, f"parameter {label}")


def _refuse_unsupported(p: Tensor, label: str) -> None:
    if p.device.type == "meta":
        raise ValueError(
            f"zo_fused: {label} is on the meta device (offloaded or not loaded); "
            "load the model completely first"
        )
    if p.dtype not in WEIGHT_DTYPES:
        raise TypeError(
            f"zo_fused: {label} has dtype {p.dtype}; supported are float16, bfloat16 and float32. "
            "Set requires_grad=False on parameters that must not be tuned."
        )
    if reason := not_dense(local(p)) or not_in_memory(local(p)):
        raise ValueError(f"zo_fused: {label} {reason}")


def make_buckets(
    param_groups: list[dict[str, Any]],
    trainable: set[int] | None,
    names: Sequence[str] = (),
    in_place: set[int] | None = None,
    by_block: bool = False,
    moves: Callable[[Tensor], bool] = requires_grad,
    matrices: bool = False,
) -> list[Bucket]:
    """One bucket per device, of the parameters that are tuned.

    Args:
        param_groups: of a `torch.optim.Optimizer`.
        trainable: positions to take instead of those that move (for replay).
        names: hyper-parameters that buckets hold on to.
        in_place: if given, matrices but for those at these positions get buckets of their own.
        by_block: parameters of different blocks get buckets of their own, in the order of blocks.
        moves: whether a parameter is tuned.
        matrices: whether sweeps see shards as matrices.

    A tensor that appears twice (tied weights under two names) is taken once, by its first name.

    Raises:
        TypeError, ValueError, NotImplementedError: a parameter is none that can be tuned, or two
            share a part of their memory.
    """
    buckets: dict[Any, Bucket] = {}
    seen: set[tuple[Any, ...]] = set()
    ids = parameter_ids(param_groups)
    fixed = [{name: group[name] for name in names} for group in param_groups]
    names_of_all = labels(param_groups)
    taken: dict[torch.device, list[int]] = {}
    position = -1
    for group_number, group in enumerate(param_groups):
        for p in group["params"]:
            position += 1
            chosen = moves(p) if trainable is None else position in trainable
            here = local(p)
            place = here.data_ptr() if here.numel() else id(p)
            memory = (here.device, place, tuple(here.shape), tuple(here.stride()))
            if not chosen or p.numel() == 0 or memory in seen:
                continue
            _refuse_unsupported(p, f"parameter {names_of_all[position]}")
            seen.add(memory)
            taken.setdefault(here.device, []).append(position)
            beside = in_place is not None and p.dim() == 2 and position not in in_place
            block = group["block"] if by_block else 0
            key = (here.device, beside, block)
            bucket = buckets.setdefault(key, Bucket(here.device, fixed, beside, block))
            bucket.owners.append(p)
            bucket.group_of.append(group_number)
            bucket.id_list.append(ids[position])
    everyone = list(chain.from_iterable(group["params"] for group in param_groups))
    for positions in taken.values():
        pair = overlap([local(everyone[position]) for position in positions])
        if pair is not None:
            first, second = (names_of_all[positions[i]] for i in pair)
            raise ValueError(
                f"zo_fused: parameters {first} and {second} share a part of their memory, which "
                "would be perturbed and updated twice; tie whole parameters, or freeze one of them"
            )
    known = {id(p): f"parameter {name}" for p, name in zip(everyone, names_of_all, strict=True)}
    for bucket in buckets.values():
        bucket.lay_out([known[id(p)] for p in bucket.owners], matrices)
    return sorted(buckets.values(), key=attrgetter("block"))
