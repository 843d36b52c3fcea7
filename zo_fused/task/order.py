"""Which examples a step sees: a pure function of seed and step, so that a run can be resumed."""

from __future__ import annotations

import functools
import hashlib

import torch


@functools.lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> list[int]:
    digest = hashlib.sha256(f"zo_fused batch order {seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randperm(size, generator=generator, device="cpu").tolist()


def batch_indices(size: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Indices of the examples of one step.

    The steps read one after the other from an endless row of permutations of ``range(size)``, a
    new one each epoch: every example comes once an epoch, and a batch may span two epochs.
    """
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [_permutation(size, seed, at // size)[at % size] for at in positions]
