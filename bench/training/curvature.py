"""How much a step of MeZO can gain on SmolLM2 and the tweets, and why it is little:
``python -m bench.training.curvature DIR`` (`python -m bench.training.tweets DIR` before it).

To second order, a step along z ~ N(0, I) with a batch B, g = z . grad(B) and learning rate lr,
changes the loss by -lr |grad|^2 + lr^2 |grad(B)|^2 tr(H) / 2 on average (Malladi et al. 2023,
section 4, with the trace of the Hessian for their effective rank). Best is
lr = |grad|^2 / (|grad(B)|^2 tr(H)); with twice that nothing is gained. z' H z comes from second
differences, and has tr(H) as its mean. All of it at the first weights, and after steps of MeZO.
"""

from __future__ import annotations

import argparse
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import zo_fused
from bench import machine

BATCH, BATCHES, DIRECTIONS, EPS = 16, 16, 16, 1e-3
LR, STEPS = 3e-5, (0, 50, 150)


def batches(folder: Path) -> list[dict[str, Tensor]]:
    """Of training tweets, padded on the left, with the two answers' numbers."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "model", padding_side="left")
    task = json.loads((folder / "data" / "task.json").read_text())
    answers = list(task["verbalizer"])
    rows = [json.loads(line) for line in (folder / "data" / "train.jsonl").read_text().splitlines()]
    made = []
    for start in range(0, BATCH * (len(rows) // BATCH), BATCH):
        part = rows[start : start + BATCH]
        texts = [task["template"].format(text=row["text"]) for row in part]
        made.append(
            {
                **tokenizer(texts, padding=True, return_tensors="pt"),
                "labels": torch.tensor([answers.index(row["label"]) for row in part]),
                "words": torch.tensor(
                    [
                        tokenizer.encode(w, add_special_tokens=False)[0]
                        for w in task["verbalizer"].values()
                    ]
                ),
            }
        )
    return made


def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Cross entropy between the two answers."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model(**inputs, logits_to_keep=1, use_cache=False).logits
    return F.cross_entropy(logits[:, -1, batch["words"]], batch["labels"])


class Found(NamedTuple):
    """At some weights."""

    loss: float
    grad: float  # |grad|^2 of the mean loss
    of_batch: float  # |grad(B)|^2, mean over batches
    trace: float  # of the Hessian
    error: float  # standard error of the trace

    def line(self, step: int) -> str:
        """A row of the table."""
        best = self.grad / (self.of_batch * self.trace)
        gain = self.grad**2 / (2 * self.of_batch * self.trace)
        return (
            f"| {step} | {self.loss:.3f} | {self.grad:.3g} | {self.of_batch:.3g} "
            f"| {self.trace:.3g} ({self.error:.2g}) | {best:.2g} | {gain:.2g} |"
        )


def measured(model: Any, data: list[dict[str, Tensor]]) -> Found:
    """With some of the directions on every pair of batches."""
    params = list(model.parameters())
    losses, of_batches = [], []
    summed = [torch.zeros_like(p) for p in params]
    for batch in data:
        value = loss(model, batch)
        grads = torch.autograd.grad(value, params)
        losses.append(float(value.detach()))
        of_batches.append(sum(float(g.double().square().sum()) for g in grads))
        torch._foreach_add_(summed, grads)
    of_batch = statistics.mean(of_batches)
    # |mean of n|^2 is |grad|^2 and an n-th of the batches' variance.
    of_mean = sum(float(s.double().square().sum()) for s in summed) / len(data) ** 2
    del summed, grads, value

    curvatures = []
    with torch.no_grad():
        for number in range(DIRECTIONS):
            part = [data[(2 * number + i) % len(data)] for i in (0, 1)]
            found: list[float] = []
            for scale in (0.0, EPS, -2 * EPS, EPS):
                generator = torch.Generator().manual_seed(number)
                for p in params:
                    if scale:
                        p.add_(torch.randn(p.shape, generator=generator), alpha=scale)
                if len(found) < 3:
                    found.append(statistics.mean(float(loss(model, batch)) for batch in part))
            middle, plus, minus = found
            curvatures.append((plus + minus - 2 * middle) / EPS**2)
    return Found(
        statistics.mean(losses),
        (len(data) * of_mean - of_batch) / (len(data) - 1),
        of_batch,
        statistics.mean(curvatures),
        statistics.stdev(curvatures) / DIRECTIONS**0.5,
    )


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("folder", type=Path, help="what bench.training.tweets has written")
    folder = parser.parse_args().folder
    data = batches(folder)
    held, trained = data[:BATCHES], data[BATCHES:]
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    opt = zo_fused.MeZO(model, lr=LR, eps=EPS)
    print("  \n".join(machine.of_cpu()))
    print("| step | loss | grad^2 | grad(B)^2 | tr(H) (error) | best lr | gain a step |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for steps in STEPS:
        while opt.step_count < steps:
            batch = trained[opt.step_count % len(trained)]
            opt.step(partial(loss, model, batch))
        print(measured(model, held).line(steps), flush=True)


if __name__ == "__main__":
    main()
