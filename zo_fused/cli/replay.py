"""``zo-fused replay``: tuned weights from base weights and a replay log."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zo_fused.cli import defaults
from zo_fused.cli.parser import add_trust_option, choice, dtype_choice, folder
from zo_fused.step.interrupts import uninterrupted
from zo_fused.task.errors import UserError, first_line

if TYPE_CHECKING:
    from torch import Tensor

HELP = "rebuild tuned weights, bit for bit, from base weights and a replay log"
_SHOWN = 10


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument(
        "--model", metavar="DIR_OR_ID", help="base model of the run (default: the embedded model)"
    )
    parser.add_argument(
        "--peft",
        **choice(defaults.BY_PEFT),
        help="the run tuned such an adapter; it starts anew from the log's seed (a prefix starts "
        "from a forward pass, which another kind of CPU may round differently)",
    )
    parser.add_argument(
        "--quantize", **choice(defaults.QUANTIZERS), help="the run quantized its base so"
    )
    parser.add_argument(
        "--dtype",
        **dtype_choice(),
        help="of the base, as in the run (default: what the log says; with --quantize, of which it "
        "has the scales alone, that of the base)",
    )
    add_trust_option(parser)
    parser.add_argument("--log", metavar="FILE", type=Path, required=True, help="replay.jsonl")
    parser.add_argument("--output", metavar="DIR", type=folder, help="directory to write")
    parser.add_argument(
        "--verify",
        metavar="DIR",
        type=Path,
        help="compare with this saved model; exit code 1 if a bit differs",
    )


def logged(path: Path) -> tuple[str, int]:
    """The dtype that most weights of the run had, and its seed. "auto", that of the base, where the
    run tuned scales of quantized layers, which may have another.

    Raises:
        UserError: the file is missing or no log.
    """
    with uninterrupted():
        from zo_fused.methods.table import methods
        from zo_fused.noise.streams import CONTRACT_VERSION
        from zo_fused.step import log_lines
        from zo_fused.task.models import DTYPES

    try:
        header = log_lines.read(path, CONTRACT_VERSION).header
    except OSError as error:
        raise UserError(f"can't read the replay log {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(first_line(error)) from error
    dtypes = Counter(dtype for _, _, dtype, _ in header["parameters"])
    made = methods().get(header["method"])
    if made is not None and made.quantized:
        return "auto", header["seed"]
    ((dtype, _),) = dtypes.most_common(1)
    if dtype not in DTYPES:
        raise UserError(f"{path} is of weights of dtype {dtype!r}, which no run has")
    return dtype, header["seed"]


def _plain(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The same, where tensors are made of others (torchao) those."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    for name, tensor in tensors.items():
        if is_traceable_wrapper_subclass(tensor):
            inner = tensor.__tensor_flatten__()[0]
            yield from _plain({f"{name}.{part}": getattr(tensor, part) for part in inner})
        else:
            yield name, tensor


def differences(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """What tells two state dicts apart, a line for each tensor; empty if every bit is the same."""
    import torch

    ours, theirs = dict(_plain(ours)), dict(_plain(theirs))
    lines = []
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs:
            lines.append(f"{name}: only in the {'saved' if name in theirs else 'replayed'} model")
            continue
        a, b = ours[name].detach().cpu(), theirs[name].detach().cpu()
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            lines.append(
                f"{name}: {a.dtype} {tuple(a.shape)} replayed, {b.dtype} {tuple(b.shape)} saved"
            )
            continue
        bits = [x.reshape(-1, 1).contiguous().view(torch.uint8) for x in (a, b)]
        count = int((bits[0] != bits[1]).any(-1).sum())
        if count:
            lines.append(f"{name}: {count} of {a.numel()} values differ")
    return lines


def run(args: argparse.Namespace, argv: list[str]) -> int:
    """Replays, saves, compares; the exit code."""
    if args.output is None and args.verify is None:
        raise UserError("give --output, --verify or both")
    if (
        args.output is not None
        and args.output.exists()
        and (not args.output.is_dir() or any(args.output.iterdir()))
    ):
        raise UserError(f"the output {args.output} is not an empty directory")
    dtype, seed = logged(args.log)
    dtype = args.dtype or dtype

    import torch

    import zo_fused
    from zo_fused.task.adapters import load_adapted
    from zo_fused.task.files import writing
    from zo_fused.task.models import choose_device, load_model, load_tokenizer, save_model

    if args.quantize is not None and args.peft is not None:
        raise UserError("--quantize and --peft exclude each other")
    base, trust = str(args.model or defaults.EMBEDDED_MODEL), bool(args.trust_remote_code)

    def load(dtype: str, device: torch.device, saved: Path | None = None) -> Any:
        if args.peft is None:
            quantize = args.quantize if saved is None else None
            return load_model(str(saved or base), dtype, device, trust, quantize=quantize)
        return load_adapted(base, dtype, device, args.peft, seed, saved, trust_remote_code=trust)

    model = load(dtype, choose_device())
    try:
        steps = zo_fused.replay(model, args.log, progress=sys.stderr.isatty())
    except ValueError as error:
        hint = "; --dtype must be that of the run" if args.quantize and not args.dtype else ""
        raise UserError(f"can't replay {args.log} on {base}: {first_line(error)}{hint}") from error
    if args.output is not None:
        with writing(args.output):
            save_model(model, load_tokenizer(base, trust), args.output)
        what = "adapter" if args.peft else "model"
        print(f"replayed {steps} steps; the {what} is in {args.output}")
    if args.verify is None:
        return 0
    cpu = torch.device("cpu")
    saved = load("auto" if args.peft is None else dtype, cpu, args.verify).state_dict()
    lines = differences(model.state_dict(), saved)
    if not lines:
        print(f"equal: all {len(saved)} tensors of {args.verify}, bit for bit")
        return 0
    print(f"different: {len(lines)} tensors of {args.verify}")
    print("\n".join(lines[:_SHOWN] + (["..."] if len(lines) > _SHOWN else [])))
    return 1
