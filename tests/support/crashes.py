"""Runs of ``zo-fused finetune`` that die, or find the disk full, at a chosen file event, and go on.

`wrong_of` starts this file as a program: a server that imports torch and transformers once and
forks for every run. See `Server`.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

# Of `sys.addaudithook`. Other events than these leave the disk as it is.
_RENAMES = {"os.rename", "os.link", "os.symlink"}
_REMOVES = {"os.remove", "os.rmdir"}
_CHANGES = {"os.mkdir", "os.truncate", "os.chmod", *_RENAMES, *_REMOVES}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_CODE_OF_DEATH = 128 + signal.SIGKILL


class Events:
    """Counts what a process does to the files below a folder, and acts before one event.

    A line of the log or the history is two events: before it, and when half of it is written.

    Args:
        folder: of the run.
        action: called with the number of every event, from 0 on, before it happens.
        syncs: whether writing through to the disk is an event; to a process that dies it is none.
    """

    def __init__(self, folder: Path, action: Callable[[int], None], syncs: bool) -> None:
        self.count = 0
        self._folder = folder
        self._action = action
        sys.addaudithook(self._audit)
        self._write, self._fsync = os.write, os.fsync
        os.write = self._written  # type: ignore[assignment]
        if syncs:
            os.fsync = self._synced  # type: ignore[assignment]
        self._wrap_history()

    def _inside(self, path: Any, of: int = -1) -> bool:
        """`of`: the open folder that it is in, as `shutil.rmtree` has it."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        if of >= 0:
            path = os.path.join(os.readlink(f"/proc/self/fd/{of}"), path)
        return Path(os.path.abspath(os.fsdecode(path))).is_relative_to(self._folder)

    def _happens(self) -> None:
        number = self.count
        self.count += 1
        self._action(number)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if flags & _WRITES and not isinstance(path, int) and self._inside(path):
                self._happens()
        elif event in _CHANGES:
            where = arguments if event in _REMOVES else arguments[event in _RENAMES :][:1]
            if self._inside(*where):
                self._happens()

    def _synced(self, file: int) -> None:
        if self._inside(file):
            self._happens()
        self._fsync(file)

    def _written(self, file: int, text: bytes) -> int:
        if not self._inside(file):
            return self._write(file, text)
        self._happens()
        done = self._write(file, text[: len(text) // 2])
        self._happens()
        return done + self._write(file, text[len(text) // 2 :])

    def _wrap_history(self) -> None:
        from zo_fused.task import history

        original, to_json = history.History.add, history.to_json

        def add(log: Any, **entry: Any) -> None:
            self._happens()
            half = to_json(entry)[:9]
            log._file.write(half)  # what a buffer may have given to the system
            log._file.flush()
            self._happens()
            log._file.seek(log._file.tell() - len(half))
            os.ftruncate(log._file.fileno(), os.fstat(log._file.fileno()).st_size - len(half))
            original(log, **entry)

        history.History.add = add  # type: ignore[method-assign]


def die_at(k: int) -> Callable[[int], None]:
    """As ``kill -9`` does it."""

    def action(number: int) -> None:
        if number == k:
            os.kill(os.getpid(), signal.SIGKILL)

    return action


def full_from(k: int) -> Callable[[int], None]:
    """No event from k on has room on the disk."""

    def action(number: int) -> None:
        if number >= k:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return action


class Server:
    """Makes runs in processes of their own.

    Args:
        folder: for the runs.
        words: of ``zo-fused finetune``, without ``--output``.
        syncs: see `Events`.
    """

    def __init__(self, folder: Path, words: list[str], syncs: bool = False) -> None:
        self.folder, self.words, self.syncs = folder, words, syncs
        self.whole = folder / "whole"
        start = time.perf_counter()
        code = self.run(self.whole, lambda _: None)
        assert code == 0, self.told(self.whole)
        self.seconds = time.perf_counter() - start
        self.events = int(Path(f"{self.whole}.count").read_text())

    def told(self, output: Path) -> str:
        """What a run has said on stderr."""
        return Path(f"{output}.err").read_text().strip()

    def start(self, output: Path, action: Callable[[int], None] | None = None) -> int:
        """A run in a process; its id."""
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            told = os.open(f"{output}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(told, 2)
            events = None if action is None else Events(output, action, self.syncs)
            code = finetune(self.words, output)
            if events is not None:
                Path(f"{output}.count").write_text(f"{events.count}")
        finally:
            if code == 1:
                traceback.print_exc()
                sys.stderr.flush()
            os._exit(code)

    def run(self, output: Path, action: Callable[[int], None] | None = None) -> int:
        """A run; its exit code."""
        return code_of(os.waitpid(self.start(output, action), 0)[1])

    def goes_on(self, output: Path) -> str:
        """Goes on with a run; what is then wrong with it."""
        from support.finetuned import assert_same_run

        code = self.run(output)
        try:
            assert code == 0, f"exit code {code}: {self.told(output)}"
            assert_same_run(self.whole, output)
        except Exception:
            return traceback.format_exc(limit=-1)
        shutil.rmtree(output)
        return ""

    # ---- what may happen to a run ----------------------------------------------------------------

    def deaths(self, points: Iterable[int], lose: bool = False) -> Iterator[str]:
        """Dies at each of these events, and goes on; what was wrong.

        Args:
            lose: whether all checkpoints are lost then.
        """
        for k in points:
            output = self.folder / f"death-{k}"
            code = self.run(output, die_at(k))
            if code != _CODE_OF_DEATH:
                yield f"event {k}: exit code {code}"
                continue
            for checkpoint in output.glob("checkpoint-*") if lose else ():
                shutil.rmtree(checkpoint)
            if wrong := self.goes_on(output):
                yield f"event {k}: {wrong}"

    def chains(self, seeds: Iterable[int]) -> Iterator[str]:
        """Dies at random events, up to five times in a row."""
        for seed in seeds:
            rng, output = random.Random(seed), self.folder / f"chain-{seed}"
            points = [rng.randrange(self.events) for _ in range(5)]
            codes = [self.run(output, die_at(k)) for k in points]
            if not {0, _CODE_OF_DEATH} >= set(codes):
                yield f"seed {seed}, events {points}: exit codes {codes}"
            elif wrong := self.goes_on(output):
                yield f"seed {seed}, events {points}: {wrong}"

    def instants(self, seeds: Iterable[int]) -> Iterator[str]:
        """Dies at random times, of `signal.SIGKILL` from outside."""
        for seed in seeds:
            rng, output = random.Random(seed), self.folder / f"instant-{seed}"
            for _ in range(2):
                pid, wait = self.start(output), rng.uniform(0, self.seconds)
                time.sleep(wait)
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            if wrong := self.goes_on(output):
                yield f"seed {seed}, the last after {wait:.2f} s: {wrong}"

    def full(self, points: Iterable[int]) -> Iterator[str]:
        """The disk is full from each of these events on; the run says so, and goes on with room."""
        for k in points:
            output = self.folder / f"full-{k}"
            code = self.run(output, full_from(k))
            told = self.told(output)
            sentence = told.startswith("zo-fused: ") and "No space left on device" in told
            goes_on = "go on with `zo-fused" in told or not output.exists()
            if code != 2 or not sentence or told.count("\n") or not goes_on:
                yield f"event {k}: exit code {code}: {told}"
            if wrong := self.goes_on(output):
                yield f"event {k}: {wrong}"


def code_of(status: int) -> int:
    """The exit code as a shell has it."""
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def finetune(words: list[str], output: Path) -> int:
    """The command that a supervisor repeats; its exit code."""
    from zo_fused.cli.main import main

    return main([*words, "--output", str(output), "--resume", "auto"])


def main() -> None:
    """Prints what was wrong, as JSON. The first argument is JSON: see `wrong_of`."""
    import torch

    from zo_fused.task import run

    torch.set_num_threads(1)
    run.expected_memory = lambda *_: "untold"  # half of a run
    run.draw = lambda history, title, path: path.write_bytes(b"a picture")
    asked = json.loads(sys.argv[1])
    folder, wrong = Path(asked["folder"]), []
    with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
        # what is imported and kept here, all processes have
        assert finetune(asked["runs"][0], folder / "first") == 0
    assert threading.active_count() == 1, "threads do not survive a fork"
    gc.freeze()  # a Trainer collects garbage
    for number, words in enumerate(asked["runs"]):
        place = folder / f"{number}"
        place.mkdir()
        server = Server(place, words, syncs=asked["kind"] == "full")
        every = range(asked.get("first", 0), server.events, asked.get("apart", 1))
        made: dict[str, Callable[[], Iterator[str]]] = {
            "deaths": lambda server=server, every=every: server.deaths(every),
            "lost": lambda server=server, every=every: server.deaths(every, lose=True),
            "full": lambda server=server, every=every: server.full(every),
            "chains": lambda server=server: server.chains(range(asked["count"])),
            "instants": lambda server=server: server.instants(range(asked["count"])),
        }
        wrong += [f"{' '.join(words)}: {text}" for text in made[asked["kind"]]()]
        print(server.events, f"{server.seconds:.2f}", *words, file=sys.stderr)
        shutil.rmtree(place)
    print(json.dumps(wrong))


def wrong_of(kind: str, folder: Path, runs: list[list[str]], **options: int) -> list[str]:
    """What is wrong with runs after what happened to them.

    Args:
        kind: the method of `Server`, or "lost": deaths after which all checkpoints are lost.
        folder: for the runs.
        runs: words of each, as in `Server`.
        options: `apart` and `first` of events, or the `count` of chains or instants.
    """
    asked = {"kind": kind, "folder": str(folder), "runs": runs, **options}
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DEACTIVATE_ASYNC_LOAD": "1",  # by threads
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, "-m", "support.crashes", json.dumps(asked)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    wrong: list[str] = json.loads(done.stdout)
    return wrong


if __name__ == "__main__":
    main()
