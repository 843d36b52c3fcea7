"""``zo-fused plan``: what a model and a step of each method take in memory."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from typing import Any

from zo_fused.cli import defaults
from zo_fused.cli.method_options import by_method
from zo_fused.cli.parser import add_trust_option, whole
from zo_fused.task.console import in_words

HELP = "show what a model and a step of each method take in memory, without loading it"

DESCRIPTION = """\
Show what a model and a step of each method take in memory, from the model's config.json alone.

Parameters, weights and state are exact. A peak is an estimate: weights, what the optimizer keeps,
and what is alive at most in a forward pass over the batch, without what kernels, allocators and the
process need for themselves."""

# Methods that have other rows than one: what to add to the title, options.
_VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "lozo": {
        ", factored": {},
        ", in place": {"schedule": "deferred"},
        ", paired": {"schedule": "paired"},
    },
    "lozo-m": {", factored": {}},
    "zo-adam": {"": {}, ", history 100": {"history": 100}},
}


def cases() -> list[tuple[str, str, dict[str, Any]]]:
    """Title, method of finetune, its options; the schedules are those that finetune takes."""
    from zo_fused.methods.table import recipes

    return [
        (recipe.title + variant, name, options)
        for name, (made, recipe) in recipes().items()
        if not made.quantized  # config.json does not say what quantizing it would leave
        for variant, options in _VARIANTS.get(name, {"": {}}).items()
    ]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument(
        "--model",
        metavar="DIR_OR_ID",
        required=True,
        help="model directory, its config.json, or Hub id",
    )
    add_trust_option(parser)
    parser.add_argument(
        "--method",
        choices=list(dict.fromkeys(name for _, name, _ in cases())),
        help="this method alone (default: all)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float16",
        help="of the weights (default: float16)",
    )
    parser.add_argument("--batch-size", type=whole, default=16, help="examples (default: 16)")
    parser.add_argument(
        "--length", type=whole, default=256, help="tokens of an example (default: 256)"
    )
    parser.add_argument("--rank", type=whole, help="of methods of low rank (default: their own)")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


def examine(args: argparse.Namespace) -> tuple[dict[str, Any], Iterator[dict[str, Any]]]:
    """What the command reports of the model, and the rows of the methods, all sizes in bytes. Some
    rows take ten seconds.

    Raises:
        UserError: the configuration can't be loaded, or makes no model.
    """
    import torch

    from zo_fused.task.memory import Outline
    from zo_fused.task.models import load_config

    config = load_config(args.model, bool(args.trust_remote_code), alone=True)
    outline = Outline(config, getattr(torch, args.dtype))
    shapes = outline.shapes()
    parameters = sum(torch.Size(shape).numel() * count for shape, count in shapes.items())
    forward = outline.activations(args.batch_size, args.length)
    found = {
        "model": args.model,
        "model_type": config.model_type,
        "parameters": parameters,
        "weights": {
            dtype: parameters * getattr(torch, dtype).itemsize
            for dtype in ("float32", "float16", "bfloat16")
        },
        "dtype": args.dtype,
        "batch_size": args.batch_size,
        "length": args.length,
        "activations": forward,
    }
    return found, _rows(args, outline, parameters, forward)


def _rows(
    args: argparse.Namespace, outline: Any, parameters: int, forward: int | None
) -> Iterator[dict[str, Any]]:
    for name, method, hyper in cases():
        if args.method in (None, method):
            yield _row(name, method, hyper, args, outline, forward)
    if args.method is None:
        yield _backpropagation(args, outline, parameters)


def _row(
    name: str,
    method: str,
    hyper: dict[str, Any],
    args: argparse.Namespace,
    outline: Any,
    forward: int | None,
) -> dict[str, Any]:
    import torch

    from zo_fused.methods.table import recipes
    from zo_fused.task.memory import kept, step_peak
    from zo_fused.task.optimizers import make_optimizer

    table = defaults.defaults(method, embedded=False)
    own = {key: value for key, value in table.items() if key in by_method()[method]} | hyper
    if args.rank is not None and "rank" in own:
        own["rank"] = args.rank
    dtype = getattr(torch, args.dtype)
    held = kept(
        lambda module, **rank: make_optimizer(method, own | rank, module),
        outline.shapes(),
        dtype,
        outline.linear(),
    )
    weights = sum(p.numel() for p in outline.model.parameters()) * dtype.itemsize
    differentiates = recipes()[method][0].differentiates
    if differentiates:
        forward = outline.activations(args.batch_size, args.length, fused=False)
    peak = step_peak(weights, held, forward, own["schedule"] == "paired", differentiates)
    return {"method": name, "state": held.state, "beside": held.beside, "peak": peak}


def _backpropagation(args: argparse.Namespace, outline: Any, parameters: int) -> dict[str, Any]:
    """AdamW as it is usual: weights and gradients in the dtype, moments in float32, and a float32
    copy of 16-bit weights, which would not take up small steps."""
    import torch

    size = getattr(torch, args.dtype).itemsize
    state = parameters * (8 if size == 4 else 12)
    saved = outline.activations(args.batch_size, args.length, backward=True)
    held = state + parameters * size
    peak = None if saved is None else parameters * size + held + saved
    return {"method": "AdamW, backpropagation", "state": state, "beside": held, "peak": peak}


def _text(found: dict[str, Any], rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """The lines, each as soon as it is known."""
    weights = ", ".join(f"{name} {in_words(size)}" for name, size in found["weights"].items())
    batch = f"{found['batch_size']} x {found['length']} tokens"
    yield f"{found['model']} ({found['model_type']}): {found['parameters']:,} parameters"
    yield f"weights: {weights}"
    yield (
        f"activations of a forward pass over {batch}, {found['dtype']}: about "
        f"{in_words(found['activations'])}"
    )
    yield ""
    yield f"{'':<24}{'state':>12}{'beside weights':>16}{'peak of a step':>16}"
    for row in rows:
        sizes = (in_words(row["state"]), in_words(row["beside"]), in_words(row["peak"]))
        yield f"{row['method']:<24}{sizes[0]:>12}{sizes[1]:>16}{sizes[2]:>16}"
    yield ""
    yield "state: in checkpoints, exact. beside weights: all that the optimizer holds between"
    yield "steps; with backpropagation also gradients. peak: an estimate, weights included;"
    yield "kernels, allocator and process need some more."
    if found["activations"] is None:
        yield "The model looks at values, so activations can't be told without weights."


def run(args: argparse.Namespace, argv: list[str]) -> int:
    """Prints the sizes; the exit code."""
    found, rows = examine(args)
    if args.json:
        print(json.dumps({**found, "methods": list(rows)}, indent=2))
        return 0
    for line in _text(found, rows):
        print(line, flush=True)
    return 0
