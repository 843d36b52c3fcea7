"""Which processes take a step together, as users say it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from zo_fused.checks import bounded, whole

LONGEST = 1e6  # seconds that a timeout may have


@dataclass(frozen=True)
class Parallel:
    """The ranks of torch.distributed that take a step together. Without `data` and `query` all
    ranks do, with batches of their own.

    Args:
        data: a DeviceMesh of one dimension, or a process group: ranks whose batches differ. The
            loss of a step is the mean of theirs.
        query: the same, for ranks that have the same batch: each evaluates a part of a step's
            perturbations, and all of them make the whole update.
        check_every: steps after which ranks compare their weights, as they do in the first step.
        timeout: seconds that a rank waits for the others in a step: longer than anything that one
            of them does alone between two steps, such as an evaluation or a save.

    Raises:
        TypeError: data or query is neither.
        ValueError: a mesh has several dimensions, a number is out of range, or data and query are
            the same.
    """

    data: Any = None
    query: Any = None
    check_every: int = 500
    timeout: float = 120.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "check_every", whole("check_every", self.check_every, 1))
        bound = f"seconds > 0 and at most {LONGEST:g}"
        seconds = bounded("timeout", self.timeout, bound, lambda x: 0 < x <= LONGEST)
        object.__setattr__(self, "timeout", seconds)
        for name in ("data", "query"):
            _check_ranks(name, getattr(self, name))
        if self.data is not None and self.data is self.query:
            raise ValueError("data and query are the same ranks, but their batches differ or don't")

    def __deepcopy__(self, memo: dict[int, Any]) -> Parallel:
        return self  # process groups can't be copied


# What `parallel=` takes. "auto": all ranks, if torch.distributed is initialized; None: no others.
Option = Parallel | Literal["auto"] | None


def check_parallel(option: Any) -> Parallel | None:
    """What an option stands for; None: every process is on its own.

    Raises:
        TypeError: it is none.
    """
    if option is None or isinstance(option, Parallel):
        return option
    if not isinstance(option, str) or option != "auto":
        raise TypeError(f'parallel must be "auto", None or zo_fused.Parallel(..), got {option!r}')
    return Parallel()


def _check_ranks(name: str, ranks: Any) -> None:
    if ranks is None:
        return
    if not (hasattr(ranks, "get_group") or (hasattr(ranks, "rank") and hasattr(ranks, "size"))):
        raise TypeError(
            f"{name} must be a DeviceMesh or a process group, got {type(ranks).__name__}"
        )
    if getattr(ranks, "ndim", 1) != 1:
        raise ValueError(
            f"{name} must be a mesh of one dimension, as mesh['dp'] is, got {ranks.ndim}"
        )
