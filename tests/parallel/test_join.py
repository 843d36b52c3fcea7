"""Ranks that come to the present step of a run by the log of the first one."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support import join_runs as runs
from support.equality import in_memory
from support.models import loss_of, network, same
from support.ranks import together

import zo_fused


@pytest.fixture(scope="module")
def two(logs: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return together(2, partial(runs.of_two, folder=logs), tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


def of(ranks: list[dict[str, Any]], name: str) -> list[Any]:
    return [rank[name] for rank in ranks]


@pytest.mark.slow
@pytest.mark.parametrize("name", runs.NAMES)
def test_all_ranks_come_back_by_the_log_of_one(name: str, two: list[dict[str, Any]]) -> None:
    """Nobody else has a file, or a checkpoint; the run ends in the bits of one that was whole."""
    first, second = (methods[name] for methods in of(two, "methods"))
    assert torch.equal(first.pop("weights"), second.pop("weights"))
    whole = {"made": runs.CUT, "there": True, "end": True, "log": True}
    assert first == second == whole


@pytest.mark.slow
def test_one_process_goes_on_where_two_have_begun(
    two: list[dict[str, Any]], logs: Path, tmp_path: Path
) -> None:
    """To the bits of a run in one process, as losses add up exactly."""
    _, alone = runs.exactly(tmp_path / "alone", runs.STEPS)
    made, weights = runs.exactly(logs / "exactly", runs.STEPS)
    assert made == runs.CUT
    assert same(weights, alone)
    assert (logs / "exactly").read_bytes() == (tmp_path / "alone").read_bytes()


@pytest.mark.slow
def test_a_step_that_never_came_is_left_out(two: list[dict[str, Any]]) -> None:
    assert of(two, "unfinished") == [(True, True)] * 2


@pytest.mark.slow
def test_new_ranks_come_to_where_the_others_are(two: list[dict[str, Any]]) -> None:
    """With what a failed step has left in the weights of those."""
    for first, second in zip(*of(two, "live"), strict=True):
        assert first[0] == 0
        assert second[0] == 3
        assert first[3] == second[3] == 5
        assert torch.equal(first[1], second[1])
        assert torch.equal(first[2], second[2])
    (_, there, *_), (_, after_failure, *_) = of(two, "live")[0]
    assert not torch.equal(there, after_failure)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("other base", ("RuntimeError: rank 1 failed", "ValueError: .* other base weights")),
        ("damaged", ("ValueError: .*line 3: the checksum", "RuntimeError: rank 0 failed")),
        ("other log open", ("RuntimeError: rank 1 failed", "RuntimeError: .*close_log")),
    ],
)
def test_where_one_rank_cannot_join_none_does(
    name: str, said: tuple[str, str], two: list[dict[str, Any]]
) -> None:
    for (message, unmoved, steps), expected in zip(of(two, name), said, strict=True):
        assert re.match(expected, message), message
        assert unmoved
        assert steps == 0


@pytest.mark.slow
def test_the_first_rank_needs_a_path(two: list[dict[str, Any]]) -> None:
    first, second = of(two, "without path")
    assert first.startswith("ValueError: join() needs the path")
    assert second.startswith("RuntimeError: rank 0 failed")


# ---- alone --------------------------------------------------------------------------------------


def test_one_process_begins_and_goes_on_in_the_same_words(tmp_path: Path) -> None:
    def run(log: Path, steps: int) -> tuple[int, torch.Tensor]:
        model = network(torch.bfloat16)
        opt = zo_fused.MeZO(model, lr=1e-2, momentum=0.9, deferred=True)
        joined = opt.join(log)
        while opt.step_count < steps:
            opt.step(loss_of(model))
        return joined, in_memory(model)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    _, weights = run(whole, 6)
    assert run(parts, 2)[0] == 0
    assert run(parts, 4)[0] == 2
    joined, there = run(parts, 6)
    assert joined == 4
    assert torch.equal(there, weights)
    assert parts.read_bytes() == whole.read_bytes()
    assert run(parts, 6)[0] == 6  # is done


def test_a_log_without_a_whole_header_is_begun_anew(tmp_path: Path) -> None:
    whole = tmp_path / "log"
    zo_fused.MeZO(network()).join(whole)
    header = whole.read_bytes()
    for size in (0, 1, 20, 30, len(header) - 1):
        log = tmp_path / f"log-{size}"
        log.write_bytes(header[:size])
        model = network()
        opt = zo_fused.MeZO(model)
        assert opt.join(log) == 0
        assert log.read_bytes() == header


@pytest.mark.parametrize("content", [b"abc", b"[1,2]\n", b'[{"format":"other"'])
def test_what_is_no_log_is_not_written_over(content: bytes, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(content)
    with pytest.raises(ValueError, match="not a zo_fused replay log"):
        zo_fused.MeZO(network()).join(log)
    assert log.read_bytes() == content


def test_a_run_without_its_log_is_refused(tmp_path: Path) -> None:
    model = network()
    opt = zo_fused.MeZO(model)
    opt.step(loss_of(model))
    with pytest.raises(FileNotFoundError, match="is no log of the 1 steps"):
        opt.join(tmp_path / "log")
    assert not (tmp_path / "log").exists()
    with pytest.raises(ValueError, match="needs the path"):
        opt.join()
    opt.start_log(tmp_path / "log")
    with pytest.raises(ValueError, match="without a path"):
        opt.join(tmp_path / "log")
    assert opt.join() == 0


def test_a_method_whose_state_is_not_in_logs_is_refused(tmp_path: Path) -> None:
    opt = zo_fused.MeZO(network())
    opt.state_beyond_log = True  # as a method of one's own may say of itself
    with pytest.raises(NotImplementedError, match="MeZO has a state that replay logs lack"):
        opt.join(tmp_path / "log")
