"""What users of a Trainer are used to, with zeroth-order steps."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from support import trainers
from support.trainers import LENGTH, Recording, equal, trainer, weights
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    Trainer,
    TrainerCallback,
    default_data_collator,
)
from transformers.trainer_pt_utils import LabelSmoother

import zo_fused
from zo_fused.hf import ZOTrainer, zeroth_order

DEFERRED = ("lozo", {"deferred": True, "eps": 1e-2, "interval": 4})
EVERY_TWO = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2}

Loss = Callable[[nn.Module, dict[str, Tensor], Tensor], Tensor]


def plain_loss(model: nn.Module, batch: dict[str, Tensor], count: Tensor) -> Tensor:
    return model(**batch, num_items_in_batch=count).loss


def looped(batches: list[Any], loss: Loss, model: nn.Module, **options: Any) -> zo_fused.LOZO:
    """After steps of LOZO in a plain loop."""
    opt = zo_fused.LOZO(model, lr=1e-3, seed=42, **DEFERRED[1], **options)
    for batch in batches:
        count = batch["labels"][:, 1:].ne(-100).sum()
        opt.step(lambda batch=batch, count=count: loss(model, dict(batch), count))
    return opt


# ---- evaluation and checkpoints -----------------------------------------------------------------


def accuracy(found: EvalPrediction) -> dict[str, float]:
    predicted, labels = found.predictions[:, :-1].argmax(-1), found.label_ids[:, 1:]
    return {"accuracy": float((predicted == labels)[labels != -100].mean())}


def test_evaluations_are_those_of_what_is_saved(tmp_path: Path) -> None:
    made = trainer(tmp_path, DEFERRED, compute_metrics=accuracy, **EVERY_TWO)
    made.train()
    evaluations = [entry for entry in made.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [2, 4, 6]
    for entry in evaluations:
        again = trainer(tmp_path / "again", kind=Trainer, compute_metrics=accuracy)
        saved = tmp_path / f"checkpoint-{entry['step']}/model.safetensors"
        again.model.load_state_dict(safetensors.torch.load_file(saved))
        found = again.evaluate()
        assert {name: entry[name] for name in ("eval_loss", "eval_accuracy")} == {
            name: found[name] for name in ("eval_loss", "eval_accuracy")
        }
    predictions = made.predict(trainers.data(4)).metrics
    assert predictions["test_loss"] == evaluations[-1]["eval_loss"]


def test_the_best_checkpoint_is_loaded_after_an_early_stop(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scores = iter([0.1, 0.5, 0.3, 0.2])
    made = trainer(
        tmp_path,
        DEFERRED,
        compute_metrics=lambda _: {"score": next(scores)},
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        save_total_limit=2,
        max_steps=20,
        **EVERY_TWO,
    )
    made.train()
    made.zeroth_order_optimizer.eval()  # as the next evaluation does
    assert "something else than the optimizer" not in caplog.text
    assert made.state.global_step == made.zeroth_order_optimizer.step_count == 8
    kept = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert kept == ["checkpoint-4", "checkpoint-8"]
    best = safetensors.torch.load_file(tmp_path / "checkpoint-4/model.safetensors")
    last = safetensors.torch.load_file(tmp_path / "checkpoint-8/model.safetensors")
    assert equal(weights(made.model), best)
    assert not equal(best, last)
    for checkpoint, expected in (("checkpoint-4", best), ("checkpoint-8", last)):
        replayed = trainers.model()
        zo_fused.replay(replayed, tmp_path / checkpoint / "replay.jsonl")
        assert equal(weights(replayed), expected)


@pytest.mark.parametrize("method", ["mezo", "lozo-m"])
def test_another_call_of_train_has_a_log_of_its_own_or_none(
    method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody knows what the weights were set to in between."""
    made = trainer(tmp_path, method)
    made.train()
    with torch.no_grad():
        for p in made.model.parameters():
            p.mul_(0.5)
    replayed = trainers.model()
    replayed.load_state_dict(weights(made.model))
    before = (tmp_path / "replay.jsonl").read_bytes()
    with caplog.at_level(logging.WARNING, "zo_fused"):
        made.train()
    if method == "mezo":
        assert "it is kept as" in caplog.text
        assert (tmp_path / "replay.1.jsonl").read_bytes() == before
        assert zo_fused.replay(replayed, tmp_path / "replay.jsonl") == 6
        assert equal(weights(replayed), weights(made.model))
    else:
        assert "no replay log: it would lack the momentum" in caplog.text
        assert (tmp_path / "replay.jsonl").read_bytes() == before


def test_a_model_that_is_made_anew_has_an_optimizer_of_its_own(tmp_path: Path) -> None:
    """As for every trial of a search."""
    made = trainer(tmp_path, DEFERRED, model=None, model_init=trainers.model)
    runs = []
    for _ in range(2):
        made.train()
        runs.append((made.model, weights(made.model)))
    assert runs[0][0] is not runs[1][0]
    assert equal(runs[0][1], runs[1][1])
    assert not equal(runs[0][1], weights(trainers.model()))


def test_callbacks_see_the_step_before_and_after(tmp_path: Path) -> None:
    seen: list[tuple[str, int]] = []

    class Watches(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, optimizer: Any, **others: Any) -> None:
            seen.append(("before", optimizer.optimizer.step_count))

        def on_optimizer_step(self, *_: Any, optimizer: Any, **others: Any) -> None:
            seen.append(("after", optimizer.optimizer.step_count))

    trainer(tmp_path, "mezo", callbacks=[Watches()], max_steps=2).train()
    assert seen == [("before", 0), ("after", 1), ("before", 1), ("after", 2)]


# ---- losses -------------------------------------------------------------------------------------


def smoothed(model: nn.Module, batch: dict[str, Tensor], count: Tensor) -> Tensor:
    labels = batch.pop("labels")
    smoother = LabelSmoother(epsilon=0.1)
    return smoother(model(**batch), labels, shift_labels=True, num_items_in_batch=count)


def in_bfloat16(model: nn.Module, batch: dict[str, Tensor], count: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return plain_loss(model, batch, count).float()


LOSSES: dict[str, tuple[dict[str, Any], Loss]] = {
    "label_smoothing": ({"label_smoothing_factor": 0.1}, smoothed),
    "autocast": ({"bf16": True}, in_bfloat16),
}


@pytest.mark.parametrize(("options", "loss"), LOSSES.values(), ids=list(LOSSES))
def test_losses_are_those_of_the_trainer(
    options: dict[str, Any], loss: Loss, tmp_path: Path
) -> None:
    recording = Recording()
    options = {**options, "data_collator": recording, "lr_scheduler_type": "constant"}
    made = trainer(tmp_path, DEFERRED, **options)
    made.train()
    expected, usual = trainers.model().train(), trainers.model().train()
    looped(recording.batches[:6], loss, expected)
    looped(recording.batches[:6], plain_loss, usual)
    assert equal(weights(made.model), weights(expected))
    assert not equal(weights(made.model), weights(usual))


def test_evaluations_are_in_the_context_of_the_trainer(tmp_path: Path) -> None:
    entered = []

    class Mine(ZOTrainer):
        def compute_loss_context_manager(self) -> Any:
            entered.append(self.state.global_step)
            return super().compute_loss_context_manager()

    trainer(tmp_path, "mezo", Mine, max_steps=2, gradient_accumulation_steps=2).train()
    assert entered == [0] * 4 + [1] * 4


def test_16_bit_weights_with_dropout(tmp_path: Path) -> None:
    """In train mode, and both signs have the same masks."""

    def tuned() -> Any:
        model = trainers.model().to(torch.bfloat16)
        model.model.embed_tokens = nn.Sequential(model.model.embed_tokens, nn.Dropout(0.5))
        return model

    recording = Recording()
    options = {"data_collator": recording, "lr_scheduler_type": "constant", "model": tuned()}
    zo = (DEFERRED[0], DEFERRED[1] | {"rounding": "stochastic"})
    made = trainer(tmp_path, zo, eval_strategy="steps", eval_steps=2, **options)
    masks = []
    dropout = made.model.model.embed_tokens[1]
    dropout.register_forward_hook(
        lambda module, _, out: masks.append(out == 0) if module.training else None
    )
    made.train()
    assert len(masks) == 12
    assert all(torch.equal(*masks[at : at + 2]) for at in range(0, 12, 2))
    assert not torch.equal(masks[0], masks[2])
    assert not equal(weights(made.model), weights(tuned()))
    assert {p.dtype for p in made.model.parameters()} == {torch.bfloat16}


def test_the_log_has_the_mean_projected_gradient_and_skipped_steps(tmp_path: Path) -> None:
    class Fails(Trainer):
        def compute_loss(self, *args: Any, **others: Any) -> Any:
            loss = super().compute_loss(*args, **others)
            return loss * math.nan if self.state.global_step == 3 else loss

    recording = Recording()
    options = {"data_collator": recording, "lr_scheduler_type": "constant"}
    made = trainer(tmp_path, ("lozo", {**DEFERRED[1], "queries": 2}), **options)
    found: list[float] = []
    step = made.log
    made.log = lambda logs, *_: (step(logs), found.append(logs.get("grad_norm")))
    made.train()
    opt = looped([], plain_loss, model := trainers.model().train(), queries=2)
    for batch, logged in zip(recording.batches[:6], found, strict=False):
        count = batch["labels"][:, 1:].ne(-100).sum()
        opt.step(lambda batch=batch, count=count: plain_loss(model, batch, count))
        assert logged == float(opt.projected_grad.abs().mean()) > 0
    skipping = zeroth_order(trainer(tmp_path, kind=Fails), "mezo")
    skipping.train()
    told = [entry.get("skipped_steps") for entry in skipping.state.log_history[:6]]
    assert told == [None, None, None, 1, 1, 1]


# ---- data ---------------------------------------------------------------------------------------


class Stream(IterableDataset[Any]):
    """As many examples as you like; their number is not known."""

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from trainers.data()


def test_batches_of_like_length_are_resumed(tmp_path: Path) -> None:
    def cut(rows: list[dict[str, Tensor]]) -> Any:
        shortest = min(len(row["input_ids"]) for row in rows)
        return default_data_collator([{n: c[:shortest] for n, c in row.items()} for row in rows])

    rows = [{n: c[: 9 + i % 4] for n, c in row.items()} for i, row in enumerate(trainers.data(6))]
    ends = []
    for name, before in (("whole", None), ("resumed", str(tmp_path / "whole/checkpoint-4"))):
        made = trainer(
            tmp_path / name,
            DEFERRED,
            train_dataset=rows,
            data_collator=cut,
            train_sampling_strategy="group_by_length",
            **EVERY_TWO,
        )
        made.train(resume_from_checkpoint=before)  # after the first batch of the second epoch
        ends.append(weights(made.model))
    assert equal(*ends)


def test_streams_are_resumed(tmp_path: Path) -> None:
    recording = Recording()
    options = {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 3}
    whole = trainer(
        tmp_path / "whole",
        DEFERRED,
        train_dataset=Stream(),
        data_collator=recording,
        gradient_accumulation_steps=2,
        **options,
    )
    whole.train()
    assert len(recording.batches) >= 12
    resumed = trainer(
        tmp_path / "resumed",
        DEFERRED,
        train_dataset=Stream(),
        gradient_accumulation_steps=2,
        **options,
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
    assert whole.state.global_step == whole.zeroth_order_optimizer.step_count == 6
    assert equal(weights(whole.model), weights(resumed.model))
    assert not equal(weights(whole.model), weights(trainers.model()))


class Regression(nn.Module):
    """A model of its own, whose forward knows nothing of counts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(LENGTH, 1)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        predicted = self.linear(input_ids / 128).squeeze(-1)
        return {"loss": (predicted - labels.float().mean(-1)).square().mean()}


def test_any_module_with_a_loss(tmp_path: Path) -> None:
    runs = []
    for size, parts in ((4, 1), (2, 2)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts}
        run = trainer(tmp_path, "mezo", model=Regression(), learning_rate=1e-6, **sizes)
        run.train()
        runs.append(run)
    losses = [[entry["loss"] for entry in run.state.log_history[:6]] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# ---- schedules ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "cosine", "constant_with_warmup", "polynomial"])
def test_schedules_are_those_of_other_optimizers(name: str, tmp_path: Path) -> None:
    options = {"lr_scheduler_type": name, "warmup_steps": 2, "max_steps": 4}
    rates = []
    for run in (trainer(tmp_path, "mezo", **options), trainer(tmp_path, kind=Trainer, **options)):
        run.train()
        rates.append([entry["learning_rate"] for entry in run.state.log_history[:4]])
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 1


def test_a_plateau_lowers_the_rate(tmp_path: Path) -> None:
    made = trainer(
        tmp_path,
        DEFERRED,
        compute_metrics=lambda _: {"score": 1.0},
        metric_for_best_model="score",
        lr_scheduler_type="reduce_lr_on_plateau",
        lr_scheduler_kwargs={"patience": 0, "factor": 0.5},
        **EVERY_TWO,
    )
    made.train()
    rates = [e["learning_rate"] for e in made.state.log_history if "loss" in e]
    assert rates == [1e-3] * 4 + [5e-4] * 2
    log = (tmp_path / "replay.jsonl").read_text()
    assert '"lr":0.0005' in log


# ---- adapters -----------------------------------------------------------------------------------


def with_adapter(model: Any) -> Any:
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(model, config)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's own
def test_adapters_alone_move_are_saved_and_resumed(tmp_path: Path) -> None:
    runs = []
    for name, before in (("whole", None), ("resumed", str(tmp_path / "whole/checkpoint-4"))):
        made = trainer(tmp_path / name, DEFERRED, model=with_adapter(trainers.model()), **EVERY_TWO)
        made.train(resume_from_checkpoint=before)
        runs.append(weights(made.model))
    assert equal(*runs)
    before = weights(with_adapter(trainers.model()))
    moved = {name for name in before if not torch.equal(before[name], runs[0][name])}
    assert moved == {name for name in before if "lora_" in name}
    saved = safetensors.torch.load_file(tmp_path / "whole/checkpoint-6/adapter_model.safetensors")
    found = {name.replace(".default", ""): runs[0][name] for name in moved}
    assert equal(saved, found)
    replayed = with_adapter(trainers.model())
    zo_fused.replay(replayed, tmp_path / "resumed/replay.jsonl")
    assert equal(weights(replayed), runs[0])


# ---- reports ------------------------------------------------------------------------------------


def test_reports_to_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    made = trainer(tmp_path, "mezo", report_to="tensorboard")
    made.train()
    board = accumulators.EventAccumulator(str(tmp_path / "board")).Reload()
    for name in ("loss", "grad_norm", "learning_rate"):
        found = [event.value for event in board.Scalars(f"train/{name}")]
        told = [entry[name] for entry in made.state.log_history[:6]]
        assert found == pytest.approx(told)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of its database
def test_reports_to_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "board"))  # read when it is imported
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    made = trainer(tmp_path, "mezo", report_to="trackio", project="zo", run_name="a run")
    made.train()
    logs = storage.get_logs("zo", "a run")
    for name in ("loss", "grad_norm", "learning_rate"):
        found = [entry[f"train/{name}"] for entry in logs if f"train/{name}" in entry]
        told = [entry[name] for entry in made.state.log_history[:6]]
        assert found == pytest.approx(told)


QUANTIZED = {
    "torchao": lambda: {"quant_type": _of("torchao.quantization").Int8WeightOnlyConfig()},
    "bitsandbytes": lambda: {"load_in_8bit": bool(_of("bitsandbytes"))},
}


def _of(package: str) -> Any:
    return pytest.importorskip(package)


@pytest.mark.filterwarnings("ignore")  # of transformers and peft, about their own
@pytest.mark.parametrize("package", list(QUANTIZED))
def test_adapters_over_a_quantized_base(package: str, tmp_path: Path) -> None:
    """Where these packages are installed (no extra has them)."""
    options = QUANTIZED[package]()
    kind = transformers.TorchAoConfig if package == "torchao" else transformers.BitsAndBytesConfig
    trainers.model().save_pretrained(tmp_path / "base")

    def quantized() -> Any:
        base = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=kind(**options), device_map="cpu"
        )
        return with_adapter(base)

    runs = []
    for name, before in (("whole", None), ("resumed", str(tmp_path / "whole/checkpoint-4"))):
        made = trainer(tmp_path / name, DEFERRED, model=quantized(), **EVERY_TWO)
        base = {n: p.detach().clone() for n, p in made.model.named_parameters() if "lora" not in n}
        made.train(resume_from_checkpoint=before)
        now = dict(made.model.named_parameters())
        assert base
        for n, p in base.items():
            same = now[n] == p if p.dtype == torch.int8 else now[n].dequantize() == p.dequantize()
            assert bool(same.all())
        runs.append({n: p.detach().clone() for n, p in now.items() if "lora" in n})
    assert equal(*runs)
    replayed = quantized()
    fresh = {n: p.detach().clone() for n, p in replayed.named_parameters() if "lora" in n}
    assert not equal(fresh, runs[0])
    zo_fused.replay(replayed, tmp_path / "resumed/replay.jsonl")
    assert equal({n: p for n, p in replayed.named_parameters() if "lora" in n}, runs[0])
