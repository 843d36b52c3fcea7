"""What reads files that may come from anywhere, and which errors each may raise for a bad one."""

from __future__ import annotations

import copy
import functools
import json
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from support.logs import records_of
from support.models import loss_of, network
from torch import nn

import zo_fused
from zo_fused.cli import config
from zo_fused.cli.run_options import run_parser
from zo_fused.noise.streams import CONTRACT_VERSION
from zo_fused.step import log_lines
from zo_fused.task import resuming
from zo_fused.task.comparison import read_outcome
from zo_fused.task.data import read_examples
from zo_fused.task.errors import UserError
from zo_fused.task.history import read_history
from zo_fused.task.prompt import Task

FOUND = Path(__file__).parent / "found"  # inputs that once went wrong, in a folder a reader
READERS: dict[str, Reader] = {}


@dataclass(frozen=True)
class Reader:
    """Reads one file.

    Attributes:
        file: its name; the suffix may matter.
        read: the file at a path.
        errors: that it may raise for a bad file.
        seeds: makes files that are good, or nearly.
    """

    file: str
    read: Callable[[Path], object]
    errors: tuple[type[Exception], ...]
    seeds: Callable[[], list[bytes]]

    def once(self, data: bytes, folder: Path) -> object:
        """What it makes of these bytes; None where it refuses them, in a sentence."""
        file = folder / self.file
        file.write_bytes(data)
        try:
            return self.read(file)
        except self.errors as error:
            said = str(error)
        assert said.strip(), "an error without a word"
        return None


def reader(
    name: str, file: str, errors: type[Exception], seeds: Callable[[], list[bytes]]
) -> Callable[[Callable[[Path], object]], Callable[[Path], object]]:
    """Puts a function into the table."""

    def put(read: Callable[[Path], object]) -> Callable[[Path], object]:
        READERS[name] = Reader(file, read, (errors,), seeds)
        return read

    return put


# ---- replay logs --------------------------------------------------------------------------------

METHODS: list[Callable[[nn.Module], Any]] = [
    lambda net: zo_fused.MeZO(net, lr=1e-2, momentum=0.9),
    lambda net: zo_fused.LOZO(net, lr=1e-2, rank=2, interval=2, queries=2, deferred=True),
    lambda net: zo_fused.ZOAdam(
        [{"params": list(net.named_parameters()), "block": 0}], block_order="simultaneous"
    ),
]


def logs() -> list[bytes]:
    """Of three steps each, one of them skipped, with a change of settings."""
    made = []
    for method in METHODS:
        with tempfile.TemporaryDirectory() as folder:
            net, log = network(), Path(folder) / "log.jsonl"
            opt = method(net)
            opt.start_log(log)
            opt.step(loss_of(net))
            opt.step(lambda: float("nan"))
            opt.flush()
            opt.param_groups[0]["lr"] = 5e-3
            net[0].bias.requires_grad_(False)
            opt.step(loss_of(net))
            opt.close_log()
            made.append(log.read_bytes())
    return made


def records() -> list[bytes]:
    """What the lines of logs say."""
    made = []
    for log in logs():
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "log").write_bytes(log)
            texts = [json.dumps(r, separators=(",", ":")) for r in records_of(Path(folder) / "log")]
        made.append("\n".join(texts).encode())
    return made


@reader("log", "log.jsonl", ValueError, logs)
def read_log(path: Path) -> object:
    return log_lines.read(path, CONTRACT_VERSION)


@reader("records", "records.jsonl", ValueError, records)
def replay_records(path: Path) -> object:
    """The lines get their checksums here, so that what is behind these is met, too."""
    log, checksum, lines = path.with_suffix(".log"), 0, []
    for text in filter(None, path.read_bytes().split(b"\n")):
        checksum = zlib.crc32(text, checksum)
        lines.append(b'[%b,"%08x"]\n' % (text, checksum))
    log.write_bytes(b"".join(lines))
    base = network()
    before = copy.deepcopy(base.state_dict())
    try:
        return zo_fused.replay(base, log)
    except RuntimeError as error:
        assert "can't allocate memory" in str(error)  # noqa: PT017 - as large as it says
        return None
    except ValueError:
        for name, value in base.state_dict().items():
            assert torch.equal(value, before[name]), "refused, and weights have moved"
        raise


# ---- data, tasks and settings -------------------------------------------------------------------

TASK = Task("{text} It was", {"0": " bad", "1": " good", "true": " yes"})


def examples() -> list[bytes]:
    one = '{"text": "fine \\u00e9", "label": 1}\n{"text": 3.5, "label": "0"}\n\n'
    array = json.dumps({"version": 1, "data": [{"text": "a", "label": True}]}, indent=1)
    return [one.encode(), array.encode(), b'\xef\xbb\xbf[{"text":"","label":"1.0"}]']


@reader("examples", "train.jsonl", UserError, examples)
def read_json(path: Path) -> object:
    return read_examples(str(path), TASK)


@reader("table", "train.csv", UserError, lambda: [b'text,label\n"a ""b""\nc",1\n\nd,0\r\n'])
def read_table(path: Path) -> object:
    return read_examples(str(path), TASK)


def tasks() -> list[bytes]:
    words = {"template": "{a} {{x}} {mask} .", "verbalizer": {"0": "no", "1": "yes"}}
    return [json.dumps(words).encode(), json.dumps({**words, "description": "d"}).encode()]


@reader("task", "task.json", UserError, tasks)
def read_task(path: Path) -> object:
    task = Task.from_file(path)
    assert task.prompt(dict.fromkeys(task.fields, "x"), "<mask>") is not None
    return task


parser = functools.cache(run_parser)


def configs() -> list[bytes]:
    own = b"method: LOZO\nlr: 1e-6\nsteps: 10\nverbalizer:\n  '0': ' bad'\n  '1': ' good'\n"
    return [own, *(path.read_bytes() for path in sorted(config.PRESETS.glob("*.yaml"))[:2])]


@reader("config", "run.yaml", UserError, configs)
def read_config(path: Path) -> object:
    return config.read(parser(), path)


# ---- what a run left ----------------------------------------------------------------------------

STEP = {"step": 1, "loss": 0.5, "projected_grad": [1.0], "forwards": 2, "seconds": 0.1}


def histories() -> list[bytes]:
    lines = [STEP, {"step": 1, "dev_accuracy": 0.5, "dev_loss": None}]
    return ["".join(json.dumps(line) + "\n" for line in lines).encode()]


@reader("history", "history.jsonl", UserError, histories)
def history(path: Path) -> object:
    return read_history(path)


@reader("summary", "summary.json", UserError, lambda: [b'{"method": "MeZO", "steps": 3}'])
def outcome(path: Path) -> object:
    (path.parent / "history.jsonl").write_bytes(histories()[0])
    return read_outcome("MeZO", 0, path.parent)


def states() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "optimizer.pt"
        torch.save(zo_fused.MeZO(network(), momentum=0.9).state_dict(), file)
        return [file.read_bytes(), b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00trueR."]


@reader("checkpoint", "optimizer.pt", ValueError, states)
def read_state(path: Path) -> object:
    """With the checksums that belong to it."""
    (path.parent / resuming._SUMS).unlink(missing_ok=True)
    (path.parent / resuming._SUMS).write_text(resuming.sums(path.parent))
    return resuming._state(path.parent)


@reader("settings", "settings.json", UserError, lambda: [b'{"lr": 1e-3, "seed": 1}'])
def read_settings(path: Path) -> object:
    return resuming.read_object(path)
