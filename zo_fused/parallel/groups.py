"""Process groups with a timeout of their own, and the collectives that steps need."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from zo_fused.parallel.options import Parallel

_MISSING = (
    "another rank did not take part in this step: it has died, hangs, or does something alone for "
    "longer than {:g} s (an evaluation, a save: see timeout of zo_fused.Parallel)"
)
# torch 2.13: a restarted world finds the addresses of the one before in the store.
_STALE = (
    "; after a restart by torchrun it may have looked for processes that are gone: set "
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where torchrun is started"
)


class Groups:
    """The groups that a rank belongs to: of ranks with the same batch, and of those with others."""

    def __init__(self, query: Any, data: Any, timeout: float) -> None:
        self.query = query
        self.data = data
        self._timeout = timeout

    @property
    def all(self) -> list[Any]:
        """Those of several ranks. One collective after the other reaches all."""
        return [group for group in (self.query, self.data) if group is not None]

    @property
    def size(self) -> int:
        """Ranks in all."""
        sizes = [dist.get_world_size(group) for group in self.all]
        return sizes[0] * (sizes[1] if len(sizes) > 1 else 1)

    @property
    def rank(self) -> int:
        """Of this process among all of them."""
        return dist.get_rank()

    @property
    def is_first(self) -> bool:
        """Whether this process is the first of all of them."""
        return not any(dist.get_rank(group) for group in self.all)

    def covers(self, group: Any) -> bool:
        """Whether the losses of a step are means over all ranks of this group."""
        ranks = set(dist.get_process_group_ranks(group))
        members = [] if self.data is None else dist.get_process_group_ranks(self.data)
        return ranks <= set(members)

    def share(self, count: int) -> range:
        """Which of so many losses this rank takes: neighbours, as the two signs of a z are; at
        least one, so that every rank's generators move on."""
        if self.query is None:
            return range(count)
        rank, size = dist.get_rank(self.query), dist.get_world_size(self.query)
        first = rank * count // size
        return range(first, max((rank + 1) * count // size, first + 1))

    def sum_(self, numbers: Tensor) -> None:
        """Each element becomes the sum over all ranks."""
        self._reduce(numbers, dist.ReduceOp.SUM)

    def max_(self, numbers: Tensor) -> None:
        """Each element becomes the largest of all ranks."""
        self._reduce(numbers, dist.ReduceOp.MAX)

    def from_first(self, numbers: Tensor) -> None:
        """Every rank gets the numbers of the first of all, by way of the first of its group."""
        for group in self.all:
            self._or_missing(partial(dist.broadcast, numbers, group=group, group_src=0))

    def share_generators(self, device: torch.device) -> None:
        """Ranks with the same batch get the same state of torch's global generators, that of the
        first of them: the losses of a step must have the same dropout."""
        if self.query is None:
            return
        cuda = device.type == "cuda"
        states: list[Any] = [
            torch.get_rng_state(),
            torch.cuda.get_rng_state(device) if cuda else None,
        ]
        self._or_missing(partial(dist.broadcast_object_list, states, group=self.query, group_src=0))
        torch.set_rng_state(states[0])
        if cuda:
            torch.cuda.set_rng_state(states[1], device)

    def _reduce(self, numbers: Tensor, operator: Any) -> None:
        for group in self.all:
            self._or_missing(partial(dist.all_reduce, numbers, operator, group=group))

    def _or_missing(self, collective: Callable[[], Any]) -> None:
        try:
            collective()
        except RuntimeError as error:
            raise RuntimeError(_MISSING.format(self._timeout)) from error


def groups_of(parallel: Parallel | None) -> Groups | None:
    """The groups of this process; None if it is alone.

    Raises:
        RuntimeError: the other ranks did not come to make them.
    """
    if parallel is None or not dist.is_available() or not dist.is_initialized():
        return None
    everyone = parallel.data is None and parallel.query is None
    data = dist.group.WORLD if everyone else parallel.data
    query, data = _made(parallel.query, parallel.timeout), _made(data, parallel.timeout)
    return Groups(query, data, parallel.timeout) if query or data else None


def _made(ranks: Any, timeout: float) -> Any:
    if ranks is None:
        return None
    group = ranks.get_group() if hasattr(ranks, "get_group") else ranks
    members = tuple(dist.get_process_group_ranks(group))
    return _group(dist.group.WORLD, members, timeout) if len(members) > 1 else None


@lru_cache(maxsize=None)  # of a world; optimizers share them
def _group(world: Any, members: tuple[int, ...], timeout: float) -> Any:
    """A group of these ranks. That of the user may wait for half an hour, and has collectives of
    its own."""
    try:
        return dist.new_group(
            list(members),
            timeout=timedelta(seconds=timeout),
            use_local_synchronization=True,
            group_desc="zo_fused",
        )
    except RuntimeError as error:
        shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        hint = _STALE if shared and restarted else ""
        raise RuntimeError(_MISSING.format(timeout) + hint) from error
