"""``zo-fused log``, and the lock of a run's directory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.models import loss_of, network

import zo_fused
from zo_fused.cli.main import main
from zo_fused.task.errors import UserError
from zo_fused.task.lock import locked


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Of seven steps, one of which was skipped, and a restore."""
    model, log = network(), tmp_path / "replay.jsonl"
    opt = zo_fused.LOZO(model, lr=1e-2, deferred=True)
    opt.start_log(log)
    for step in range(7):
        opt.step(loss_of(model) if step != 4 else lambda: float("nan"))
    opt.flush()
    opt.close_log()
    return log


def test_show(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["log", "show", str(log)]) == 0
    out = capsys.readouterr().out
    assert "LOZO(" in out
    assert "deferred=True" in out
    assert "7, from 0 to 6, 1 of them skipped" in out
    assert "step 4: skipped, a loss was not finite, lr 0.01" in out
    assert out.endswith("step 7: put back without an update, lr 0.01\n")


def test_verify(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["log", "verify", str(log)]) == 0
    assert capsys.readouterr().out.startswith("whole: 7 steps of LOZO in ")
    whole = log.read_bytes()
    log.write_bytes(whole[:-5])
    assert main(["log", "verify", str(log)]) == 0
    assert "of a line that was cut off" in capsys.readouterr().out
    lines = whole.splitlines(True)
    log.write_bytes(b"".join([*lines[:3], *lines[4:]]))
    assert main(["log", "verify", str(log)]) == 2
    error = capsys.readouterr().err
    assert "line 4: the checksum is wrong" in error
    assert error.count("\n") == 1
    assert main(["log", "verify", str(log.parent / "none")]) == 2
    assert "can't read the replay log" in capsys.readouterr().err


HOLD = """
import sys, time
from pathlib import Path
from zo_fused.task.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        try:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(UserError, match="another process is at work"), locked(tmp_path):
                pass
        finally:
            holder.kill()
    with locked(tmp_path):
        assert not os.listdir(tmp_path)
