"""What one rank knows, on all of them; and what all of them do, or none."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import torch

from zo_fused.parallel.groups import Groups

Made = TypeVar("Made")


def known_to_first(groups: Groups | None, device: torch.device, make: Callable[[], bytes]) -> bytes:
    """What a function returns on the first rank, on all ranks. It is called nowhere else.

    Args:
        groups: None: this process is alone.
        device: where collectives are.

    Raises:
        Whatever the function raises, and RuntimeError on the other ranks.
    """
    first = groups is None or groups.is_first
    made = on_all(groups, device, lambda: make() if first else b"")
    if groups is None:
        return made
    length = torch.tensor([len(made)], dtype=torch.int64, device=device)
    groups.from_first(length)
    numbers = torch.empty(int(length), dtype=torch.uint8, device=device)
    if made:
        numbers.copy_(torch.frombuffer(bytearray(made), dtype=torch.uint8))
    if len(numbers):
        groups.from_first(numbers)
    return numbers.cpu().numpy().tobytes()


def on_all(groups: Groups | None, device: torch.device, action: Callable[[], Made]) -> Made:
    """What each rank's function returns there, once it has on all ranks.

    Raises:
        Whatever the function raises, and RuntimeError on the other ranks.
    """
    if groups is None:
        return action()
    failure: BaseException | None = None
    try:
        made = action()
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        failure = error
    failed = float(failure is not None)
    told = torch.tensor([failed, failed * groups.rank], dtype=torch.float64, device=device)
    if failure is not None:
        with suppress(Exception):  # others that are not there: this error says more
            groups.sum_(told)
        raise failure
    groups.sum_(told)
    count, number = told.tolist()
    if count:
        which = f"rank {number:.0f}" if count == 1 else f"{count:.0f} ranks"
        raise RuntimeError(f"{which} failed, see the error there")
    return made
