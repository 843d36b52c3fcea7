"""Workers that die, and others that come: the scripts of examples/parallel, in processes."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor, nn

import zo_fused

pytestmark = pytest.mark.slow  # processes that import torch, one after the other

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples/parallel"
PACED = ROOT / "tests/support/paced.py"
TORCHRUN = ("-m", "torch.distributed.run", "--monitor-interval=0.1")
Weights = dict[str, Tensor]
STARTED: list[subprocess.Popen[bytes]] = []


def begin(folder: Path, name: str, *words: object) -> subprocess.Popen[bytes]:
    """A process with the package. What it says is in a file of that name."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # docs/scaling.md says why
    command = [sys.executable, *map(str, words)]
    with open(folder / name, "wb") as file:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=file)
    STARTED.append(process)
    return process


def ended(process: subprocess.Popen[bytes], folder: Path, name: str) -> str:
    """What it said."""
    status = process.wait(300)
    said = (folder / name).read_text()
    assert status == 0, said
    return said


def run(folder: Path, *words: object) -> str:
    return ended(begin(folder, "said", *words), folder, "said")


def wait_until(condition: Callable[[], object]) -> None:
    for _ in range(2400):
        if condition():
            return
        time.sleep(0.1)
    raise TimeoutError


def steps_in(folder: Path) -> int:
    log = folder / "replay.jsonl"
    return log.read_bytes().count(b"\n") - 1 if log.exists() else -1


def weights_in(folder: Path) -> list[Weights]:
    return [torch.load(file) for file in sorted(folder.glob("weights-*.pt"))]


def base() -> nn.Module:
    """Of the scripts."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))


def replayed(folder: Path, steps: int) -> Weights:
    model = base()
    assert zo_fused.replay(model, folder / "replay.jsonl") == steps
    return dict(model.state_dict())


def distance(a: Weights, b: Weights) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def assert_rounded_otherwise(a: Weights, b: Weights) -> None:
    """As tests/parallel/test_parallel.py has it: sums of losses are rounded in other places."""
    assert distance(a, b) <= 2e-3 * distance(a, base().state_dict())


@pytest.fixture
def address() -> Iterator[str]:
    """A port that nobody else gets in the seconds until a process listens there."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{held.getsockname()[1]}"


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No process of a test outlives it."""
    yield
    while STARTED:
        kill(STARTED.pop())


def kill(process: subprocess.Popen[bytes]) -> None:
    """With those that it has started."""
    if process.poll() is None:
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            one.kill()
        process.wait()


def test_killed_workers_come_back_to_the_bits_of_an_undisturbed_run(tmp_path: Path) -> None:
    """One rank, and then the one that writes the log, each in the middle of a step."""
    whole, disturbed = tmp_path / "whole", tmp_path / "disturbed"
    script = (EXAMPLES / "elastic.py", "--steps", 60)
    options = (*TORCHRUN, "--standalone", "--nproc-per-node=2", "--max-restarts=2")
    for folder in (whole, disturbed):
        folder.mkdir()
    run(whole, *options, *script)
    said = run(disturbed, *options, PACED, 0, "1:20,0:37", *script)
    assert re.findall(r"2 ranks made (\d+) steps in [0-9.]+ s", said) == ["20", "37"]
    weights = [*weights_in(whole), *weights_in(disturbed)]
    assert [distance(weights[0], other) for other in weights] == [0, 0, 0, 0]
    logs = [(folder / "replay.jsonl").read_bytes() for folder in (whole, disturbed)]
    assert logs[0] == logs[1]


def test_nodes_come_and_go(tmp_path: Path, address: str) -> None:
    """Two nodes, each a torchrun of one worker. The second one comes late, and dies."""
    together, alone = tmp_path / "together", tmp_path / "alone"
    script = (EXAMPLES / "elastic.py", "--steps", 150)
    for folder in (together, alone):
        folder.mkdir()
    node = (
        *(*TORCHRUN, "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=9", "--rdzv-id=run"),
        *("--rdzv-backend=c10d", f"--rdzv-endpoint={address}"),
        "--rdzv-conf=last_call_timeout=1,keep_alive_interval=2,keep_alive_max_attempt=4",
        *(PACED, 0.5, "-", *script),
    )
    first = begin(together, "first", *node)
    wait_until(lambda: steps_in(together) >= 3)
    second = begin(together, "second", *node)
    said = [together / "first", together / "second"]  # either may have rank 0
    wait_until(lambda: any("2 ranks made" in file.read_text() for file in said))
    made = steps_in(together)
    wait_until(lambda: steps_in(together) >= made + 3)
    kill(second)
    wait_until(lambda: "1 ranks made" in said[0].read_text())
    (together / "hurry").touch()
    ended(first, together, "first")
    assert distance(replayed(together, 150), *weights_in(together)) == 0
    run(alone, *TORCHRUN, "--standalone", "--nproc-per-node=1", *script)
    assert_rounded_otherwise(*weights_in(together), *weights_in(alone))


def test_a_worker_comes_late_and_the_first_one_goes_on(tmp_path: Path, address: str) -> None:
    script = (PACED, 0.1, "-", EXAMPLES / "late.py", address, "--steps", 400)
    first = begin(tmp_path, "first", *script, "--first")
    wait_until(lambda: steps_in(tmp_path) >= 3)
    second = begin(tmp_path, "second", *script)
    wait_until(lambda: "steps by the log" in (tmp_path / "second").read_text())
    (tmp_path / "hurry").touch()
    ended(first, tmp_path, "first")
    made = re.search(r"rank 1: (\d+) steps by the log", ended(second, tmp_path, "second"))
    assert made is not None
    assert 0 < int(made[1]) < 400
    one, other = weights_in(tmp_path)
    assert distance(one, other) == 0
    assert distance(replayed(tmp_path, 400), one) == 0
