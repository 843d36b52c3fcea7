"""How much a step of MeZO can gain on SmolLM2 and the tweets, and why it is little:
``python -m bench.training.curvature DIR`` (`python -m bench.training.tweets DIR` before it).

To second order, a step along z ~ N(0, I) with a batch B, g = z . grad(B) and learning rate lr,
changes the loss by -lr |grad|^2 + lr^2 |grad(B)|^2 tr(H) / 2 on average (Malladi et al. 2023,
section 4, with the trace of the Hessian for their effective rank). Best is
lr = |grad|^2 / (|grad(B)|^2 tr(H)); with twice that nothing is gained. The gradients are those of
the first weights; z' H z comes from second differences, and has tr(H) as its mean.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench import machine

BATCH, BATCHES, DIRECTIONS, EPS = 16, 16, 8, 1e-3


def batches(folder: Path) -> list[dict[str, Tensor]]:
    """Of training tweets, padded on the left, with the two answers' numbers."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "model", padding_side="left")
    task = json.loads((folder / "data" / "task.json").read_text())
    answers = list(task["verbalizer"])
    rows = [json.loads(line) for line in (folder / "data" / "train.jsonl").read_text().splitlines()]
    made = []
    for start in range(0, BATCH * BATCHES, BATCH):
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


def main() -> None:
    """Prints the quantities."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("folder", type=Path, help="what bench.training.tweets has written")
    folder = parser.parse_args().folder
    data = batches(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    params = list(model.parameters())

    of_batches = []
    summed = [torch.zeros_like(p) for p in params]
    for batch in data:
        grads = torch.autograd.grad(loss(model, batch), params)
        of_batches.append(sum(float(g.double().square().sum()) for g in grads))
        torch._foreach_add_(summed, grads)
    of_batch = statistics.mean(of_batches)
    # |mean of n|^2 is |grad|^2 and an n-th of the batches' variance.
    of_mean = sum(float(s.double().square().sum()) for s in summed) / BATCHES**2
    of_all = (BATCHES * of_mean - of_batch) / (BATCHES - 1)
    del summed

    curvatures = []
    with torch.no_grad():
        for number in range(DIRECTIONS):
            part = data[2 * number % BATCHES : 2 * number % BATCHES + 2]
            found = []
            for scale in (0.0, EPS, -2 * EPS, EPS):
                generator = torch.Generator().manual_seed(number)
                for p in params:
                    p.add_(torch.randn(p.shape, generator=generator), alpha=scale)
                found.append(sum(float(loss(model, batch)) for batch in part) / len(part))
            middle, plus, minus, _ = found
            curvatures.append((plus + minus - 2 * middle) / EPS**2)
    trace = statistics.mean(curvatures)
    spread = statistics.stdev(curvatures) / DIRECTIONS**0.5
    best = of_all / (of_batch * trace)
    gain = of_all**2 / (2 * of_batch * trace)
    print("  \n".join(machine.of_cpu()))
    print(f"|grad|^2 {of_all:.3g}, |grad(B)|^2 {of_batch:.3g} (batches of {BATCH})")
    print(f"tr(H) {trace:.3g}, standard error {spread:.2g}")
    print(f"best lr {best:.2g}; a step of it gains {gain:.2g}")


if __name__ == "__main__":
    main()
