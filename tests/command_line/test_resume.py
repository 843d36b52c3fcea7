"""Runs of ``zo-fused finetune`` that stop, are damaged, and go on: they end in the bits of a run
that never stopped."""

import json
import os
import shutil
import signal

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")

from support.finetuned import Stop, assert_same_run, read

from zo_fused.cli.main import main
from zo_fused.task import run as a_run
from zo_fused.task.console import Console
from zo_fused.task.scoring import Scorer
from zo_fused.task.trainer import SKIPPED_IN_A_ROW

pytestmark = pytest.mark.usefixtures("no_network", "quick")


def kill():
    raise MemoryError("killed")  # as SIGKILL: nobody gets to save anything


def send(number):
    return lambda: os.kill(os.getpid(), number)


def told_command(error):
    """The command that the last sentence of an error says."""
    return error.rpartition("`zo-fused ")[2].rstrip("`\n").split()


# Losses a step, then the options. Windows of two steps: of six steps some end in the middle of one.
RUNS = [
    (2, "--method lozo --schedule factored --interval 2 --dtype float16"),
    (1, "--method lozo --schedule paired --interval 2 --dtype bfloat16"),
    (2, "--method mezo --schedule deferred --dtype float16"),
    (2, "--method lozo --momentum 0.9 --interval 2 --lr-scheduler cosine"),
    (2, "--method zo-adam --schedule deferred --dtype bfloat16 --lr-scheduler linear"),
    (4, "--method mezo --schedule plain --queries 2 --dtype float16"),
]


@pytest.mark.parametrize(("losses", "words"), RUNS)
def test_a_run_that_stops_three_times(arguments, tmp_path, monkeypatch, capsys, losses, words):
    """By Ctrl-C within step 2, before the first checkpoint; by SIGTERM, which lets step 4 come to
    its end; by death in step 6, after which the checkpoint is lost. Step 3 is evaluated."""
    more, whole, out = words.split(), tmp_path / "whole", tmp_path / "out"
    assert main(arguments(*more, output=whole)) == 0
    with monkeypatch.context() as patch:
        Stop(patch, 2 * losses, send(signal.SIGINT))
        assert main(arguments(*more)) == 130
    error = capsys.readouterr().err
    assert "interrupted: 1 of 6 steps are done and in the log; go on with `zo-fused" in error
    again = told_command(error)
    assert again == arguments(*more, "--resume")
    with monkeypatch.context() as patch:
        Stop(patch, 2 * losses + 1, send(signal.SIGTERM))
        assert main(again) == 143
    printed, error = capsys.readouterr()
    assert "going on after step 1: the base weights and 1 steps of replay.jsonl, in" in printed
    assert "ended by SIGTERM: 4 of 6 steps are done and in the log; go on with `zo-fused" in error
    assert "Traceback" not in error
    with monkeypatch.context() as patch:
        Stop(patch, 2 * losses, kill)
        with pytest.raises(MemoryError):
            main(told_command(error))
    assert "going on after step 4: checkpoint-3 and 1 steps of" in capsys.readouterr().out
    shutil.rmtree(out / "checkpoint-3")
    assert main([*arguments(*more), "--resume", "auto"]) == 0
    assert_same_run(whole, out)


@pytest.fixture
def stopped(arguments, tmp_path, monkeypatch, capsys):
    """A run that was killed in step 5, with a checkpoint of step 3, and one that never stopped."""
    more = ("--method", "lozo", "--schedule", "deferred", "--dtype", "bfloat16")
    assert main(arguments(*more, output=tmp_path / "whole")) == 0
    with monkeypatch.context() as patch:
        Stop(patch, 10, kill)
        with pytest.raises(MemoryError):
            main(arguments(*more))
    capsys.readouterr()
    return arguments(*more, "--resume")


def flip(path):
    """One bit, in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def zero(path):
    """As after a loss of power."""
    path.write_bytes(bytes(path.stat().st_size))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", flip),
        ("model.safetensors", zero),
        ("optimizer.pt", cut),
        ("config.json", os.unlink),
        ("SHA256SUMS", cut),
        ("SHA256SUMS", os.unlink),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(stopped, tmp_path, capsys, name, damage):
    damage(tmp_path / "out" / "checkpoint-3" / name)
    assert main(stopped) == 0
    printed, error = capsys.readouterr()
    assert f"warning: {tmp_path / 'out' / 'checkpoint-3'} is passed over: {name}" in error or (
        name == "SHA256SUMS" and "checkpoint-3 is passed over: " in error
    )
    assert error.count("\n") == 1
    assert "going on after step 4: the base weights and 4 steps of replay.jsonl" in printed
    assert_same_run(tmp_path / "whole", tmp_path / "out")


def test_history_and_log_may_end_apart(stopped, tmp_path, capsys):
    """A step has its line in the log first; after a loss of power each has what was on the disk."""
    out = tmp_path / "out"
    history = out / "history.jsonl"
    *lines, last = history.read_text().splitlines(keepends=True)
    history.write_text("".join(lines) + last[:9])
    assert main(stopped) == 0
    assert "going on after step 3: checkpoint-3\n" in capsys.readouterr().out
    assert_same_run(tmp_path / "whole", out)


def test_a_log_that_was_cut_takes_the_checkpoint_with_it(stopped, tmp_path, capsys):
    log = tmp_path / "out" / "replay.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:3]))  # the header and two steps
    assert main(stopped) == 0
    printed, error = capsys.readouterr()
    assert "passed over: it is of step 3, and the log ends at step 2" in error
    assert "going on after step 2: the base weights" in printed
    assert_same_run(tmp_path / "whole", tmp_path / "out")


def test_what_can_not_be_gone_on_from_is_told(stopped, arguments, tmp_path, capsys):
    out = tmp_path / "out"
    log, history, settings = out / "replay.jsonl", out / "history.jsonl", out / "settings.json"
    lines, steps = log.read_bytes().splitlines(keepends=True), history.read_bytes()
    other = (tmp_path / "whole" / "replay.jsonl").read_bytes().replace(b'"seed":0', b'"seed":1')
    kept = {path: path.read_bytes() for path in (log, history, settings)}
    for change, message in (
        (log.unlink, f"can't resume: {log} is missing; put it back, or start again with"),
        (lambda: log.write_bytes(lines[0][:50]), f"can't resume: {log} is missing"),
        (lambda: log.write_bytes(b"".join(lines[:2] + lines[3:])), "line 3: the checksum is wrong"),
        (lambda: log.write_bytes(other), "line 1: the checksum is wrong"),
        (lambda: log.write_bytes(b"x\n"), f"{log} is not a zo_fused replay log"),
        (history.unlink, f"can't read the history {history}: No such file"),
        (lambda: history.write_bytes(steps + b"\xff\n"), "history.jsonl:8: not JSON"),
        (lambda: history.write_bytes(steps + b'{"loss": 1}\n'), "history.jsonl:8: not a line of"),
        (
            lambda: history.write_bytes(steps + steps.splitlines()[-1] + b"\n"),
            f"in {history} a step is missing, or comes twice",
        ),
        (lambda: settings.write_text("{"), f"can't read {settings}: not JSON"),
        (lambda: settings.write_text("[]"), f"can't read {settings}: not a JSON object"),
        (settings.unlink, "nothing to resume in "),
    ):
        change()
        assert main(stopped) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        for path, content in kept.items():
            path.write_bytes(content)
    for more, message in (
        (["--lr", "2e-3"], "the run was started with lr 0.001, not 0.002"),
        (
            ["--template", "{text} So", "--verbalizer", "negative= a", "positive= b"],
            "training data",
        ),
    ):
        assert main([*stopped, *more]) == 2
        assert message in capsys.readouterr().err
    assert main(arguments(*stopped[stopped.index("--method") : -1])) == 2
    assert "holds an interrupted run; add --resume" in capsys.readouterr().err
    assert main(stopped) == 0
    assert_same_run(tmp_path / "whole", out)


def test_the_log_of_another_run_is_refused(stopped, arguments, tmp_path, capsys):
    """One of the same options but another base, or of other losses."""
    out, log = tmp_path / "out", tmp_path / "out" / "replay.jsonl"
    more = stopped[stopped.index("--method") : -1]
    assert main(arguments(*more, "--batch-size", "3", output=tmp_path / "other")) == 0
    shutil.copyfile(tmp_path / "other" / "replay.jsonl", log)
    capsys.readouterr()
    assert main(stopped) == 2
    error = capsys.readouterr().err
    assert f"{log} is not the log that the state was saved with: up to step 3" in error
    assert error.count("\n") == 1
    assert not [path.name for path in out.iterdir() if path.name.endswith(".tmp")]


# ---- for supervisors -----------------------------------------------------------------------------


def test_auto_begins_goes_on_and_is_done(arguments, tmp_path, monkeypatch, capsys):
    """One command line, for whatever is there."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main(arguments(output=whole)) == 0
    config = tmp_path / "run.yaml"
    config.write_text("resume: auto\n")
    words = arguments("--config", str(config))
    with monkeypatch.context() as patch:
        Stop(patch, 5, send(signal.SIGUSR1))
        assert main(words) == 128 + signal.SIGUSR1
    error = capsys.readouterr().err
    assert "ended by SIGUSR1: 3 of 6 steps are done and in the log" in error
    assert told_command(error) == words
    (out / "checkpoint-3.tmp").mkdir()  # as a kill leaves it
    assert main(words) == 0
    assert_same_run(whole, out)
    left = {path: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    looks = iter([False])  # another process comes to the end of the run after the first look
    with monkeypatch.context() as patch:
        patch.setattr(a_run, "is_finished", lambda run: next(looks, True))
        assert main(words) == 0
    assert f"the run in {out} is finished\n" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in out.iterdir()} == left
    for _ in range(2):  # the second time as if killed before the last files were deleted
        assert main(words) == 0
        printed = capsys.readouterr().out
        assert f"the run in {out} is finished\n" in printed
        assert "test accuracy" in printed
        assert {path: path.read_bytes() for path in out.iterdir()} == left
        (out / "settings.json").write_text("{}")
        (out / "checkpoint-3").mkdir()
    assert main([*words, "--lr", "2e-3"]) == 2
    assert "holds a finished run with lr 0.001, not 0.002" in capsys.readouterr().err
    assert main(arguments("--resume", "never")) == 2
    assert "argument --resume: invalid choice: 'never'" in capsys.readouterr().err
    (out / "summary.json").unlink()
    (out / "checkpoint-3").rmdir()
    (out / "settings.json").unlink()
    assert main(words) == 2
    assert "is not empty; add --overwrite" in capsys.readouterr().err


def test_signals_between_steps(arguments, tmp_path, monkeypatch, capsys):
    """In an evaluation a signal does not wait; another one finds the end under way."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main(arguments(output=whole)) == 0
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in (signal.SIGTERM, signal.SIGINT):
        with monkeypatch.context() as patch:

            def both(*_, number=number):
                try:
                    os.kill(os.getpid(), number)
                finally:
                    os.kill(os.getpid(), signal.SIGINT)

            patch.setattr(Scorer, "evaluate", both)
            assert main([*arguments(), "--resume", "auto"]) == 128 + number
        error = capsys.readouterr().err
        assert "0 of 6 steps are done" in error
        assert error.count("\n") == 1
    assert {number: signal.getsignal(number) for number in before} == before
    with monkeypatch.context() as patch:
        patch.setattr(a_run, "save_model", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert main([*arguments(), "--resume"]) == 143
    error = capsys.readouterr().err
    assert "ended by SIGTERM: no step was under way, and none is lost; go on with" in error
    assert main([*arguments(), "--resume"]) == 0
    assert_same_run(whole, out)


def test_a_run_that_was_stopped_before_it_began(arguments, tmp_path, monkeypatch, capsys):
    """The command that is told is the one that was given."""
    with monkeypatch.context() as patch:
        patch.setattr(a_run, "load_tokenizer", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        assert main(arguments()) == 130
    assert told_command(capsys.readouterr().err) == arguments()
    assert main(arguments("--resume")) == 2
    assert "nothing to resume: there is no directory" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    assert main(arguments("--resume")) == 2
    assert "no run has begun there" in capsys.readouterr().err
    (tmp_path / "out" / "settings.json.tmp").touch()
    assert main(arguments("--resume", "auto")) == 0


def test_a_run_that_diverged_stays_stopped(arguments, tmp_path, monkeypatch, capsys):
    """However often a supervisor starts it again."""
    monkeypatch.setattr(Scorer, "loss", lambda *_: torch.tensor(float("nan")))
    words = arguments("--steps", "50", "--resume", "auto")
    for _ in range(2):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert f"{SKIPPED_IN_A_ROW} steps in a row were skipped, as a loss was not" in error
        history = read(tmp_path / "out" / "history.jsonl")
        assert [e["loss"] for e in history if "loss" in e] == [None] * SKIPPED_IN_A_ROW


def test_a_log_that_is_removed_under_the_run_stops_it(arguments, tmp_path, monkeypatch, capsys):
    for name in ("replay.jsonl", "history.jsonl"):
        file = tmp_path / "out" / name
        with monkeypatch.context() as patch:
            Stop(patch, 8, file.unlink)
            assert main(arguments("--overwrite")) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"zo-fused: {file}: No such file or directory; then go on with `")
        assert not file.exists()
        assert main(told_command(error)) == 2
        error = capsys.readouterr().err
        assert f"{file} is missing; put it back" in error or f"history {file}: No such" in error


def test_a_closed_pipe_loses_nothing(arguments, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main(arguments(output=whole)) == 0
    original = Console.line

    def line(console, text):
        if text.startswith("step 3"):
            raise BrokenPipeError
        original(console, text)

    with monkeypatch.context() as patch:
        patch.setattr(Console, "line", line)
        assert main(arguments()) == 141
    assert main(arguments("--resume")) == 0
    assert_same_run(whole, out)


def test_no_memory_loses_nothing(arguments, tmp_path, monkeypatch, capsys):
    whole, out = tmp_path / "whole", tmp_path / "out"
    more = ("--method", "mezo", "--schedule", "deferred", "--dtype", "float16")
    assert main(arguments(*more, output=whole)) == 0

    def none():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        Stop(patch, 4, none)
        assert main(arguments(*more)) == 2
    error = capsys.readouterr().err
    assert "with memory for it, go on with `zo-fused finetune" in error
    assert main(told_command(error)) == 0
    assert_same_run(whole, out)
    assert json.loads((out / "summary.json").read_text())["steps"] == 6
