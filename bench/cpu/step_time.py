"""Whole optimizer steps with real forward passes:
``python -m bench.cpu.step_time --model opt-125m``.

A zeroth-order step can't be faster than the forward passes in it, so every step is compared with
two forward passes alone. Variants take turns, so that whatever else the machine does hits all
alike; medians are reported. A turn is one step, or as many as fill `TURN`.

LOZO pays for a new window once in `INTERVAL` steps. What that costs does not depend on the tokens,
so it is measured where it shows best, at the fewest: steps with a window of one step less steps
within a window. A share of it is added to every step that is reported.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import itertools
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import zo_fused
from bench import machine, published
from bench.cpu.step_time_report import BASELINE, Measured, Quartiles, markdown, plot
from bench.models import DTYPES, OPT, POSITIONS, VOCABULARY
from zo_fused.cli.defaults import EMBEDDED_MODEL
from zo_fused.task.models import load_model

Step = Callable[[], object]
Loss = Callable[[nn.Module], Tensor]

LR, EPS, RANK, INTERVAL = 1e-7, 1e-3, 2, 50
LONGEST = 256  # tokens of a sequence
TURN = 0.1  # seconds
HEADS = {"opt-tiny": 2, "opt-125m": 12}
MODELS = (*HEADS, "embedded")
LOSSES = {
    "last": "cross entropy of the last position of every sequence",
    "lm": "cross entropy of all positions",
}

# name, class, options of the constructor
FUSED: list[tuple[str, Any, dict[str, Any]]] = [
    ("MeZO", zo_fused.MeZO, {}),
    ("MeZO deferred", zo_fused.MeZO, {"deferred": True}),
    ("LOZO", zo_fused.LOZO, {}),
    ("LOZO deferred", zo_fused.LOZO, {"deferred": True}),
    ("LOZO factored", zo_fused.LOZO, {"mode": "factored"}),
    ("LOZO factored, paired", zo_fused.LOZO, {"mode": "factored", "paired": True}),
]

# ---- model and batch ----------------------------------------------------------------------------


def make_model(name: str, dtype: torch.dtype, device: torch.device) -> Any:
    """An OPT with random weights, or the model that zo_fused ships; in eval mode."""
    if name == "embedded":
        return load_model(str(EMBEDDED_MODEL), dtype, device)
    from transformers import OPTConfig, OPTForCausalLM

    hidden, layers, ffn = OPT[name]
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        num_hidden_layers=layers,
        num_attention_heads=HEADS[name],
        ffn_dim=ffn,
        max_position_embeddings=POSITIONS - 2,  # OPT counts from 2
    )
    torch.manual_seed(0)
    model: Any = OPTForCausalLM(config)
    return model.to(device, dtype).eval()


class Batch(NamedTuple):
    ids: Tensor  # int64 [sequences, length]
    targets: Tensor  # the same shape: the token after each


def make_batch(tokens: int, config: Any, device: torch.device) -> Batch:
    """Random ids, exactly `tokens` of them, in sequences of equal length.

    Raises:
        ValueError: they don't fill whole sequences.
    """
    length = min(tokens, LONGEST, config.max_position_embeddings)
    if length < 1 or tokens % length:
        raise ValueError(f"{tokens} tokens don't fill whole sequences of {length}")
    generator = torch.Generator().manual_seed(0)
    shape = (tokens // length, length + 1)
    ids = torch.randint(config.vocab_size, shape, generator=generator).to(device)
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


def make_loss(batch: Batch, kind: str) -> Loss:
    """The loss of a model, in float32; see `LOSSES`."""
    keep = 1 if kind == "last" else batch.ids.shape[1]
    targets = batch.targets[:, -keep:].flatten()

    def loss(model: nn.Module) -> Tensor:
        logits = model(input_ids=batch.ids, logits_to_keep=keep, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets)

    return loss


# ---- steps --------------------------------------------------------------------------------------


def two_forwards(model: nn.Module, loss: Loss) -> Step:
    """What no two-sided step can do without."""

    @torch.no_grad()
    def step() -> None:
        loss(model)
        loss(model)

    return step


def fused(cls: Any, model: nn.Module, loss: Loss, **options: Any) -> Step:
    """A step of this package."""
    opt = cls(model, lr=LR, eps=EPS, **options)
    return lambda: opt.step(lambda: loss(model))


def published_code(method: str, model: nn.Module, loss: Loss) -> Step:
    """A step of a released code: four sweeps around two forward passes."""
    opt = published.METHODS[method](model.parameters())

    @torch.no_grad()
    def step() -> None:
        opt.perturb(1)
        loss(model)
        opt.perturb(-2)
        loss(model)
        opt.perturb(1)
        opt.update()

    return step


def adamw(model: nn.Module, loss: Loss, dtype: torch.dtype) -> Step:
    """Forward, backward and update of a float32 model, computing in `dtype`."""
    opt = torch.optim.AdamW(model.parameters(), lr=LR)
    device = next(model.parameters()).device.type

    def step() -> None:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            value = loss(model)
        value.backward()
        opt.step()
        opt.zero_grad()

    return step


def variants(model: Any, loss: Loss, windows: bool) -> tuple[dict[str, Step], dict[str, Step]]:
    """Steps of all variants by name; and, if asked for, LOZO's with a window of one step.

    Variants that leave anything but slightly other numbers in the model (an open perturbation,
    hooks, tensors that moved) have a copy of their own.
    """
    dtype = next(model.parameters()).dtype
    steps = {BASELINE: two_forwards(model, loss)}
    changing: dict[str, Step] = {}

    def own() -> Any:
        return copy.deepcopy(model)

    for name, cls, options in FUSED:
        if cls is not zo_fused.LOZO:
            steps[name] = fused(cls, own() if options else model, loss, **options)
            continue
        for interval, into in ((1 << 30, steps), (1, changing)):
            if interval > 1 or windows:
                settings = {**options, "rank": RANK, "interval": interval}
                into[name] = fused(cls, own() if options else model, loss, **settings)
    for name in published.METHODS:
        steps[f"published {name}"] = published_code(name, own(), loss)
    if dtype != torch.float16:  # that would need a scaled loss
        steps["AdamW"] = adamw(own().float(), loss, dtype)
    return steps, changing


# ---- measuring ----------------------------------------------------------------------------------


def quartiles(times: Sequence[float]) -> Quartiles:
    """Of at least one number."""
    parts = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    return Quartiles(*torch.tensor(times, dtype=torch.float64).quantile(parts).tolist())


def amortised(within: Quartiles, change: float) -> Quartiles:
    """A step of a whole window, from steps within it and what its last costs more than those."""
    return Quartiles(*(seconds + change / INTERVAL for seconds in within))


def race(steps: dict[str, Step], repeats: int, title: str, cuda: bool) -> dict[str, Quartiles]:
    """Seconds of each kind of step, the baseline among them; they take turns."""

    def turn(step: Step, count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            step()
        if cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / count

    for step in tqdm(steps.values(), desc=f"{title}, warm-up", leave=False):
        turn(step, 1)
    count = max(1, round(TURN / turn(steps[BASELINE], 1)))
    times: dict[str, list[float]] = {name: [] for name in steps}
    with tqdm(total=repeats * len(steps), desc=title) as bar:
        for _ in range(repeats):
            for name, step in steps.items():
                times[name].append(turn(step, count))
                bar.update()
    return {name: quartiles(own) for name, own in times.items()}


def measure(
    name: str, dtype: str, tokens: Sequence[int], repeats: int, loss: str, device: torch.device
) -> Measured:
    """All variants of a model at all sizes of batch."""
    model = make_model(name, DTYPES[dtype], device)
    batches = {size: make_batch(size, model.config, device) for size in sorted(tokens)}
    found = Measured(name, dtype, {}, {})
    for size, batch in batches.items():
        steps, changing = variants(model, make_loss(batch, loss), windows=not found.rows)
        every = {**steps, **{f"{variant}, new window": step for variant, step in changing.items()}}
        times = race(every, repeats, f"{name} {dtype}, {size} tokens", device.type == "cuda")
        for variant in changing:
            change = times[f"{variant}, new window"].median - times[variant].median
            found.changes[variant] = change
        found.rows[size] = {
            variant: amortised(times[variant], found.changes.get(variant, 0.0)) for variant in steps
        }
        del steps, changing, every
        gc.collect()  # copies of the model, before the next are made
    return found


# ---- command line --------------------------------------------------------------------------------


def header(device: torch.device, loss: str, repeats: int) -> Iterator[str]:
    """What was measured, where and how."""
    yield "# Step time\n"
    command = f"python -m bench.cpu.step_time {shlex.join(sys.argv[1:])}"
    yield f"`{command}`, {datetime.date.today()}."
    yield "How to read it: [bench/README.md](../README.md).\n"
    on_gpu = [f"GPU: {torch.cuda.get_device_name(device)}"] if device.type == "cuda" else []
    yield "  \n".join([*on_gpu, *machine.of_cpu()]) + "\n"
    yield (
        f"Loss: {LOSSES[loss]}, in float32; random ids in sequences of at most {LONGEST} tokens; "
        f"eval mode. LOZO: rank {RANK}, interval {INTERVAL}. AdamW has float32 weights and, for "
        f"bf16, autocasts; it has no row for fp16. {repeats} repeats.\n"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["opt-125m"])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[64, 256, 512, 1024, 4096])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--loss", choices=LOSSES, default="last", help=str(LOSSES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    parser.add_argument("--plot", type=Path, help="draw the overheads")
    options = parser.parse_args()
    device = torch.device(options.device)
    lines = [*header(device, options.loss, options.repeats)]
    everything = []
    for model, dtype in itertools.product(options.model, options.dtype):
        found = measure(model, dtype, options.tokens, options.repeats, options.loss, device)
        everything.append(found)
        lines += markdown(found)
        if options.out:  # at once: a run that is cut short keeps what it had
            options.out.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))
    if options.plot:
        plot(everything, options.plot)


if __name__ == "__main__":
    main()
