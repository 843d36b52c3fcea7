"""Rebuilding tuned weights from the base weights and a replay log."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zo_fused.methods.table import arguments, methods
from zo_fused.noise.streams import CONTRACT_VERSION, plain_name
from zo_fused.parallel.groups import groups_of
from zo_fused.parallel.options import Parallel
from zo_fused.parallel.telling import on_all
from zo_fused.step import log_lines
from zo_fused.step.access import plain_tensors
from zo_fused.step.fingerprint import fingerprint
from zo_fused.step.log_bytes import read_by_first
from zo_fused.step.log_writer import check_base
from zo_fused.step.optimizer import ZerothOrderOptimizer
from zo_fused.step.repeat import repeat
from zo_fused.step.sharded import Resharding
from zo_fused.sweeps.shards import is_sharded, local


@plain_tensors
def replay(
    model: nn.Module | Mapping[str, Tensor],
    log: str | os.PathLike[str],
    progress: bool = False,
) -> int:
    """Apply a replay log to base weights, in place: the run's weights, bit for bit, on any device.

    No forward pass is made. The sweeps are those of the run, but dense ones many steps in one pass
    over the weights (`zo_fused.directions.tape`). If it is interrupted, the weights are of no use.

    Args:
        model: the base model in the dtype of the run, or its tensors by name. It may be sharded
            (docs/sharded.md), whether it was in the run or not; all processes call this then.
        log: path of the log; of a sharded model, the first process reads it.
        progress: show a tqdm bar.

    Returns:
        Number of steps, skipped ones included.

    Raises:
        FileNotFoundError: no such log.
        ValueError: the file is no log, or model and log don't fit.
    """
    held = model.parameters() if isinstance(model, nn.Module) else model.values()
    shard = next((local(p) for p in held if is_sharded(p)), None)
    if isinstance(model, nn.Module):
        Resharding(model).close()
    groups = None if shard is None else groups_of(Parallel())
    device = torch.device("cpu") if shard is None else shard.device
    with read_by_first(groups, device, log) as file:
        record = on_all(groups, device, lambda: log_lines.read(file, CONTRACT_VERSION))
    optimizer = _optimizer(model, record)
    events: Any = record.events
    if progress:
        from tqdm import tqdm

        events = tqdm(events, desc="replay", unit="step")
    weights = optimizer.weights
    repeat(weights, optimizer.rule, optimizer.update, events, moving=None)
    optimizer.flush()  # a run that was cut off left its weights where its schedule has them
    return sum(not event.restored for event in record.events)


def _optimizer(
    model: nn.Module | Mapping[str, Tensor], record: log_lines.Log
) -> ZerothOrderOptimizer:
    """The optimizer of the log's header over the model's tensors."""
    header = record.header
    if header["method"] not in methods():
        home = f": import {header['module']}" if "module" in header else ""
        raise ValueError(
            f"the log is of method {header['method']!r}; known are {', '.join(sorted(methods()))}. "
            f"A method of your own must be imported first{home}"
        )
    table = header["parameters"]
    method = methods()[header["method"]]
    tensors = _tensors(model, table, method)
    groups: list[dict[str, Any]] = [{"params": []} for _ in header["groups"]]
    for (name, shape, dtype, number), tensor in zip(table, tensors, strict=True):
        label = name if name is not None else f"at position {sum(len(g['params']) for g in groups)}"
        found = [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
        if found != [shape, dtype]:
            raise ValueError(
                f"parameter {label} is {found[1]} {found[0]} in the model, {dtype} {shape} in the "
                "log; load the base model in the dtype of the run"
            )
        groups[number]["params"].append(tensor if name is None else (name, tensor))
    check_base(record.path, header, fingerprint(tensors))
    defaults = {**header["groups"][0], **header["options"]}  # every group has values of its own
    defaults |= {"seed": header["seed"], "module": nn.Module()}
    factored = defaults.get("mode") == "factored"
    takes = arguments(method)
    try:
        optimizer = method(groups, **{name: defaults[name] for name in takes if name in defaults})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{record.path}, line 1: {error}") from None
    now = optimizer.direction.options.get("transform", "portable")
    if header["transform"] != now:
        raise ValueError(
            f"the log was written with noise of the transform {header['transform']!r}, where this "
            f"version has {now!r}: replay it with the version that wrote it"
        )
    for number, (group, values) in enumerate(
        zip(optimizer.param_groups, header["groups"], strict=True)
    ):
        group.update({name: v for name, v in values.items() if name in optimizer.defaults})
        if "param_names" in group:  # those that the run had its noise from
            group["param_names"] = [name for name, *_, of in table if of == number]
    if factored:
        optimizer.weights.beside.module = None  # nothing will be evaluated
    optimizer.check_events(record.path, record.events)
    return optimizer


def _tensors(
    model: nn.Module | Mapping[str, Tensor],
    table: list[list[Any]],
    method: type[ZerothOrderOptimizer],
) -> list[Tensor]:
    """The model's tensors in the order of the log's table."""
    if isinstance(model, nn.Module):
        named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        named.update(method.found_in(model))
        if table and table[0][0] is None:
            tensors: list[Tensor] = list(model.parameters())
            trainable = [p for p in tensors if p.requires_grad]
            tensors = trainable if len(trainable) == len(table) else tensors
            if len(tensors) != len(table):
                raise ValueError(
                    f"the log has {len(table)} unnamed parameters, the model {len(tensors)}"
                )
            return tensors
    else:
        named = dict(model)
    # The model may be compiled or wrapped.
    plain = {plain_name(name): tensor for name, tensor in named.items()}
    tensors = []
    for name, *_ in table:
        tensor = named.get(name, None if name is None else plain.get(plain_name(name)))
        if tensor is None:
            raise ValueError(f"the model has no parameter {name!r}, which the log tunes")
        tensors.append(torch.Tensor.detach(tensor))
    return tensors
