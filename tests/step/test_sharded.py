"""FSDP2, tensor parallel and DTensors of any placement, on gloo: see `support.sharding`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
from support import sharding

import zo_fused
from zo_fused.step import fingerprint

OF_FOUR = [
    *("fsdp_over_tensor_parallel", "load_in_another_world", "copies_share_queries"),
    *("logs_of_copies", "copies_that_cannot_share", "copies_equal_one_process"),
    *("copies_are_saved_and_logged", "copies_that_differ"),
]
OF_TWO = [name for name in sharding.CHECKS if name not in OF_FOUR]
AGAIN = [
    *("weights_that_hold_their_index", "functions_take_dtensors", "fsdp_runs_equal_one_process"),
    *("runs_of_any_placement_equal_one_process", "fingerprints_of_any_placement"),
    *("logs_are_those_of_one_process", "factored_steps_in_place_where_nothing_is_gathered"),
]


def started(world: int, names: list[str], folder: Path) -> Path:
    """Processes that have made these checks; one start for all, as it takes seconds."""
    (folder / "store").unlink(missing_ok=True)
    arguments = (world, names, str(folder))
    multiprocessing.start_processes(  # type: ignore[attr-defined]
        sharding.run, arguments, nprocs=world, join=False, start_method="spawn"
    ).join(timeout=None)
    return folder


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    return run_quietly(2, OF_TWO, folder)


@pytest.fixture(scope="module")
def of_four(of_two: Path) -> Path:
    """The checkpoint of two processes is there."""
    return run_quietly(4, [*AGAIN, *OF_FOUR], of_two)


def run_quietly(world: int, names: list[str], folder: Path) -> Path:
    try:
        return started(world, names, folder)
    except Exception:  # told by the files that it left
        return folder


def check_files(folder: Path, name: str, world: int) -> None:
    for rank in range(world):
        file = folder / f"{name}.{rank}"
        assert file.exists(), f"process {rank} did not come so far"
        assert not file.read_text(), file.read_text()


@pytest.mark.parametrize("name", OF_TWO)
def test_two_processes(of_two: Path, name: str) -> None:
    check_files(of_two, name, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*AGAIN, *OF_FOUR])
def test_four_processes(of_four: Path, name: str) -> None:
    check_files(of_four, name, 4)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", sharding.SAVED)
def test_one_process_loads_what_two_have_saved(of_two: Path, name: str) -> None:
    alone, model = sharding.net(), sharding.net()
    sharding.train(alone, sharding.METHODS[name], lambda: sharding.loss_of(alone), 5)
    optimizer = sharding.load_with_dcp(of_two, name, model)
    for _ in range(2):
        optimizer.step(lambda: sharding.loss_of(model))
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float64])
def test_sums_of_parts_make_the_sum_of_the_whole(dtype: torch.dtype) -> None:
    """Whatever the cuts: at odd places, in the middle of a word of a fingerprint."""
    for shape, cuts in {
        (301, 515): ([(0, 7)], [(1, 3)], [(0, 150), (1, 257)], [(1, 0)]),
        (70001,): ([(0, 1)], [(0, 65537), (0, 3)]),
        (3, 5, 7): ([(1, 2)], [(2, 3), (0, 1)]),
    }.items():
        words = torch.arange(2 * torch.Size(shape).numel(), dtype=torch.int32) * 0x9E3779B1
        tensor = words.view(dtype)[: torch.Size(shape).numel()].view(shape)
        for some in cuts:
            parts = [(tensor, (0,) * len(shape))]
            for dim, at in some:
                parts = [half for part in parts for half in halves(*part, dim, at)]
            total = sum(
                int(fingerprint.sum_of_part(part, zo_fused.Shard(shape, starts)))
                for part, starts in parts
            )
            whole = fingerprint.weighted_sum(tensor)
            assert (total + fingerprint._of_size(tensor) - whole) % 2**64 == 0, (shape, some)


def halves(part: torch.Tensor, starts: tuple[int, ...], dim: int, at: int) -> list[Any]:
    """A part of a tensor, cut where the whole has this index."""
    here = min(max(at - starts[dim], 0), part.shape[dim])
    second = tuple(s + here * (d == dim) for d, s in enumerate(starts))
    return [
        (part.narrow(dim, 0, here), starts),
        (part.narrow(dim, here, part.shape[dim] - here), second),
    ]
