"""``zo-fused log``: what is in a replay log, and whether it is whole."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from zo_fused.step.interrupts import uninterrupted
from zo_fused.task.errors import UserError, first_line

HELP = "show a replay log, or verify that it is whole"
DESCRIPTION = (
    "Show what a replay log is of, or verify it: every checksum, and that a run can have written "
    "it. Exit code 0 if it is whole, 2 and a sentence if not."
)
_SHOWN = 5


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("action", choices=["show", "verify"], help="what to do")
    parser.add_argument("file", metavar="FILE", type=Path, help="replay.jsonl")


def run(args: argparse.Namespace, argv: list[str]) -> int:
    """Shows or verifies; the exit code."""
    with uninterrupted():
        from zo_fused.noise.streams import CONTRACT_VERSION
        from zo_fused.step import log_lines

    try:
        log = log_lines.read(args.file, CONTRACT_VERSION)
        size, written = args.file.stat().st_size, args.file.stat().st_mtime
    except OSError as error:
        raise UserError(f"can't read the replay log {args.file}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(first_line(error)) from error
    done = [event for event in log.events if not event.restored]
    if args.action == "verify":
        torn = f"; {size - log.end} bytes behind them are of a line that was cut off"
        print(
            f"whole: {len(done)} steps of {log.header['method']} in {args.file}, checksum "
            f"{log.checksum:08x}{torn if size > log.end else ''}"
        )
        return 0
    skipped = sum(event.projected_grads is None for event in done)
    for name, value in _about(log.header).items():
        print(f"{name + ':':<14}{value}")
    first = log.header["first_step"]
    steps = f"{len(done)}, from {first} to {done[-1].step}" if done else "0"
    print(f"{'steps:':<14}{steps}" + (f", {skipped} of them skipped" if skipped else ""))
    print(f"{'restores:':<14}{len(log.events) - len(done)}")
    print(f"{'size:':<14}{size} bytes, last written {_time(written)}, checksum {log.checksum:08x}")
    for event in log.events[-_SHOWN:]:
        lr = ", ".join(f"{group['lr']:g}" for group in event.groups)
        print(f"step {event.step}: {_outcome(event)}, lr {lr}")
    return 0


def _about(header: dict[str, Any]) -> dict[str, str]:
    options = ", ".join(f"{name}={value!r}" for name, value in header["options"].items())
    sizes = [len(header[name]) for name in ("parameters", "trainable", "groups")]
    return {
        "method": f"{header['method']}({options})",
        "seed": str(header["seed"]),
        "noise": f"contract {header['contract']}, transform {header['transform']}",
        "base": f"fingerprint {header['base']}",
        "parameters": "{}, {} of them move, in {} groups".format(*sizes),
    }


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _outcome(event: Any) -> str:
    if event.restored:
        return "put back without an update"
    if event.projected_grads is None:
        return "skipped, a loss was not finite"
    grads = [f"{g:g}" for g in event.projected_grads[:3]]
    return f"g {', '.join(grads)}" + (", .." if len(event.projected_grads) > 3 else "")
