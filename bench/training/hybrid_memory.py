"""Peak memory of steps on the CPU: ``python -m bench.training.hybrid_memory --out FILE.md``.

Zeroth-order steps against backpropagation and `Hybrid` between them, over the length of the
sequence and over the depth of the model. Every number is of a process of its own, which makes the
model, lets a few tokens through it, and then takes a step, or two where there is a state (the
second has it beside the activations). The kernel tells the peak of its resident set from there on.

Bytes saved for backward are counted as autograd saves them, weights not included.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import multiprocessing
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import zo_fused
from bench import machine
from bench.cpu.step_time import HEADS, LOSSES, Batch, make_loss, make_model
from bench.models import DTYPES, OPT

LR = 1e-7
CPU = torch.device("cpu")


class Case(NamedTuple):
    """One process."""

    method: str  # "MeZO", "SGD", "AdamW", or "Hybrid k": the embeddings and k layers by MeZO
    model: str
    dtype: str
    layers: int
    tokens: int  # of the one sequence
    loss: str


class Memory(NamedTuple):
    """Bytes."""

    weights: int
    before: int  # resident before the steps
    peak: int  # resident at most, in the steps
    saved: int  # by autograd at most


# ---- one process --------------------------------------------------------------------------------


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status: VmRSS now, VmHWM at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"the kernel does not tell {field}")


class Saved:
    """Counts what autograd saves in the blocks it is open in."""

    def __init__(self, model: nn.Module) -> None:
        self._weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.most = 0

    def watch(self, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def watched() -> Tensor:
            kept: dict[int, int] = {}

            def pack(x: Tensor) -> Tensor:
                storage = x.untyped_storage()
                if storage.data_ptr() not in self._weights:
                    kept[storage.data_ptr()] = storage.nbytes()
                return x

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                value = loss()
            self.most = max(self.most, sum(kept.values()))
            return value

        return watched


def make_step(method: str, model: nn.Module) -> Callable[[Callable[[], Tensor]], object]:
    """A function that takes a step with a loss."""
    if method == "MeZO":
        return zo_fused.MeZO(model, lr=LR).step
    if method.startswith("Hybrid"):
        first, rest = zo_fused.first_layers(model, int(method.split()[1]))
        return zo_fused.Hybrid(zo_fused.MeZO(first, lr=LR), torch.optim.AdamW(rest, lr=LR)).step
    opt = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}[method](model.parameters(), lr=LR)

    def step(loss: Callable[[], Tensor]) -> None:
        loss().backward()
        opt.step()
        opt.zero_grad()

    return step


def make_sequence(tokens: int, vocabulary: int) -> Batch:
    """One sequence of random ids."""
    ids = torch.randint(vocabulary, (1, tokens + 1), generator=torch.Generator().manual_seed(0))
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


def run(case: Case) -> Memory:
    """Measures in this process, which should do nothing else."""
    from transformers.initialization import no_init_weights

    hidden, _, ffn = OPT[case.model]
    OPT[case.model] = (hidden, case.layers, ffn)
    with no_init_weights():  # that would take longer than the steps
        model = make_model(case.model, DTYPES[case.dtype], CPU)
    model.tie_weights()
    for p in model.parameters():
        nn.init.uniform_(p, -0.02, 0.02)
    vocabulary = model.config.vocab_size
    step = make_step(case.method, model)
    saved = Saved(model)
    with torch.no_grad():  # threads, kernels
        make_loss(make_sequence(8, vocabulary), case.loss)(model)
    loss = make_loss(make_sequence(case.tokens, vocabulary), case.loss)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    before = resident("VmRSS")
    for _ in range(1 if case.method in ("MeZO", "SGD") else 2):
        step(saved.watch(lambda: loss(model)))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return Memory(weights, before, resident("VmHWM"), saved.most)


def measure(case: Case) -> Memory:
    """Runs a case in a process of its own, forked where everything is imported already."""
    # Freed activations go back to the system and don't pile up in the heap.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 17)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.cpu.step_time", "transformers.models.opt.modeling_opt"])
    with context.Pool(1) as pool:
        return pool.apply(run, (case,))


# ---- tables --------------------------------------------------------------------------------------

Found = dict[Case, Memory]


def _mb(size: int) -> str:
    return f"{size / 1e6:.0f}"


def title(method: str, layers: int) -> str:
    """Of a column."""
    k = method.removeprefix("Hybrid ")
    return method if k == method else f"Hybrid, {k} of {layers} layers ZO"


def table(found: Found, row: str, cell: Callable[[Memory], int]) -> Iterator[str]:
    """Rows over a field of the cases, columns over methods; MB."""
    methods = list(dict.fromkeys(case.method for case in found))
    layers = next(iter(found)).layers
    yield f"| {row} | " + " | ".join(title(method, layers) for method in methods) + " |"
    yield "|---" * (1 + len(methods)) + "|"
    for value in sorted({getattr(case, row) for case in found}):
        of = {case.method: memory for case, memory in found.items() if getattr(case, row) == value}
        cells = [_mb(cell(of[method])) if method in of else "" for method in methods]
        yield f"| {value} | " + " | ".join(cells) + " |"


def beyond(memory: Memory) -> int:
    """What a step adds to what was there: activations, gradients, state."""
    return memory.peak - memory.before


def markdown(lengths: Found, depths: Found) -> Iterator[str]:
    """Lines: peaks, what a step adds, what autograd saves; then over depth."""
    some = next(iter(lengths))
    weights = _mb(lengths[some].weights)
    yield f"## {some.model}, {some.dtype}: over the length of one sequence\n"
    yield f"Peak resident set, MB (weights: {weights} MB; Python and libraries are in it):\n"
    yield from table(lengths, "tokens", lambda memory: memory.peak)
    yield "\nWhat the steps add to the resident set (activations, gradients, state), MB:\n"
    yield from table(lengths, "tokens", beyond)
    yield "\nSaved for backward, MB:\n"
    yield from table(lengths, "tokens", lambda memory: memory.saved)
    if not depths:
        return
    tokens = next(iter(depths)).tokens
    yield f"\n## Over the depth, {tokens} tokens\n"
    yield "What the steps add to the resident set, MB:\n"
    yield from table(depths, "layers", beyond)
    yield "\nSaved for backward, MB:\n"
    yield from table(depths, "layers", lambda memory: memory.saved)


def header(loss: str) -> Iterator[str]:
    """What was measured, where and how."""
    yield "# Memory of a step\n"
    command = f"python -m bench.training.hybrid_memory {shlex.join(sys.argv[1:])}".strip()
    yield f"`{command}`, {datetime.date.today()}.\n"
    yield "  \n".join(machine.of_cpu()) + "\n"
    yield (
        "Each number: a process of its own, which takes a step, or two where there is a state. "
        f"Loss: {LOSSES[loss]}; eval mode. Hybrid: MeZO for the embeddings and the first layers, "
        "AdamW for the others. MB: 10^6 bytes.\n"
    )


# ---- command line --------------------------------------------------------------------------------


def cases(options: argparse.Namespace) -> tuple[list[Case], list[Case]]:
    """Over the length, over the depth."""
    layers = options.layers or OPT[options.model][1]

    def case(method: str, layers: int, tokens: int) -> Case:
        return Case(method, options.model, options.dtype, layers, tokens, options.loss)

    hybrids = [f"Hybrid {third * layers // 3}" for third in (1, 2)]
    compared = ("MeZO", "SGD")  # at all lengths
    lengths = [
        case(method, layers, tokens)
        for method in ("MeZO", *hybrids, "SGD", "AdamW")
        for tokens in options.lengths
        if method in compared or tokens in options.tokens
    ]
    depths = [
        case(method, depth, max(options.tokens)) for method in compared for depth in options.depths
    ]
    return lengths, depths


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=HEADS, default="opt-125m")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--layers", type=int, help="instead of the model's")
    lengths = [64, 128, 512, 1024, 2048]
    parser.add_argument("--lengths", nargs="+", type=int, default=lengths)
    parser.add_argument(
        "--tokens", nargs="+", type=int, default=[128, 512, 1024], help="of the other methods"
    )
    parser.add_argument("--depths", nargs="*", type=int, default=[3, 6, 12])
    parser.add_argument("--loss", choices=LOSSES, default="last", help=str(LOSSES))
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    options = parser.parse_args(arguments)
    over_length, over_depth = cases(options)
    found: Found = {}
    for case in tqdm(dict.fromkeys([*over_length, *over_depth])):
        found[case] = measure(case)
        parts = [{c: found[c] for c in some if c in found} for some in (over_length, over_depth)]
        text = "\n".join([*header(options.loss), *markdown(*parts)]) + "\n"
        if options.out:  # at once: a run that is cut short keeps what it had
            options.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
