"""The benchmark of whole steps: its batches, its arithmetic, its tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

from transformers import OPTConfig

from bench.cpu import step_time
from bench.cpu.step_time_report import BASELINE, Measured, Quartiles, markdown, overhead

CPU = torch.device("cpu")
PUBLISHED = ["published MeZO", "published LOZO"]


@pytest.fixture(autouse=True)
def short_turns_and_global_generator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One step a turn; the published codes seed the global generator, so give it back."""
    monkeypatch.setattr(step_time, "TURN", 0.0)
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


@pytest.mark.parametrize(
    ("tokens", "longest", "shape"),
    [(8, 2048, (1, 8)), (256, 2048, (1, 256)), (1024, 2048, (4, 256)), (256, 64, (4, 64))],
)
def test_a_batch_has_the_tokens_asked_for(
    tokens: int, longest: int, shape: tuple[int, int]
) -> None:
    config = OPTConfig(vocab_size=100, max_position_embeddings=longest)
    batch = step_time.make_batch(tokens, config, CPU)
    assert batch.ids.shape == batch.targets.shape == shape
    assert torch.equal(batch.ids[:, 1:], batch.targets[:, :-1])
    assert 0 <= int(batch.ids.min()) <= int(batch.ids.max()) < 100


def test_tokens_that_fill_no_whole_sequences_are_refused() -> None:
    with pytest.raises(ValueError, match="300 tokens don't fill whole sequences of 256"):
        step_time.make_batch(300, OPTConfig(), CPU)


def test_losses_are_those_of_transformers() -> None:
    model = step_time.make_model("opt-tiny", torch.float32, CPU)
    batch = step_time.make_batch(16, model.config, CPU)
    with torch.no_grad():
        logits = model(input_ids=batch.ids).logits
        every = step_time.make_loss(batch, "lm")(model)
        last = step_time.make_loss(batch, "last")(model)
        # `labels` are shifted by the model: it never sees the target of the last position.
        its_own = model(input_ids=batch.ids, labels=batch.ids).loss
    assert float(last) == pytest.approx(-float(logits[0, -1].log_softmax(-1)[batch.targets[0, -1]]))
    assert 16 * float(every) == pytest.approx(15 * float(its_own) + float(last), rel=1e-5)


def test_arithmetic() -> None:
    assert overhead(3.0, 2.0) == pytest.approx(50)
    assert overhead(1.5, 2.0) == pytest.approx(-25)
    assert step_time.quartiles([5.0, 1.0, 3.0, 2.0, 4.0]) == (2.0, 3.0, 4.0)
    assert step_time.quartiles([7.0]) == (7.0, 7.0, 7.0)
    within, changing = 0.2, 0.7
    found = step_time.amortised(Quartiles(0.1, within, 0.3), changing - within)
    assert found.median == pytest.approx((49 * within + changing) / 50)
    assert found.high - found.low == pytest.approx(0.2)


def test_table_of_given_times() -> None:
    row = {BASELINE: Quartiles(0.9, 1.0, 1.1), "MeZO": Quartiles(1.1, 1.12, 1.2)}
    lines = list(markdown(Measured("opt-tiny", "fp32", {8: row}, {"LOZO": 0.0123})))
    assert "| tokens | two forwards | MeZO |" in lines
    assert "| 8 | 1000 | 1120, +12 % |" in lines
    assert "| 8 | 900 to 1100 | 1100 to 1200 |" in lines
    assert "LOZO 12.3." in lines[-1]


def test_windows_are_measured_at_the_fewest_tokens() -> None:
    found = step_time.measure("opt-tiny", "fp16", [16, 8], 1, "last", CPU)
    assert list(found.rows) == [8, 16]
    ours = [name for name, *_ in step_time.FUSED]
    assert all(list(row) == [BASELINE, *ours, *PUBLISHED] for row in found.rows.values())
    assert list(found.changes) == [name for name in ours if name.startswith("LOZO")]
    times = [number for row in found.rows.values() for of in row.values() for number in of]
    assert all(0 < seconds < 60 for seconds in times)


def test_variants_share_no_weights_with_those_that_move_them() -> None:
    model = step_time.make_model("opt-tiny", torch.float32, CPU)
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    loss = step_time.make_loss(step_time.make_batch(8, model.config, CPU), "last")
    steps, changing = step_time.variants(model, loss, windows=True)
    for step in [*steps.values(), *changing.values()]:
        step()
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
    assert all(p.grad is None for p in model.parameters())
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks


def test_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, picture = tmp_path / "table.md", tmp_path / "plot.png"
    arguments = ["--model", "opt-tiny", "--dtype", "bf16", "--tokens", "8", "--repeats", "1"]
    command = ["step_time.py", *arguments, "--out", str(out), "--plot", str(picture)]
    monkeypatch.setattr("sys.argv", command)
    step_time.main()
    text = out.read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    assert "`python -m bench.cpu.step_time --model opt-tiny --dtype bf16" in text
    names = [BASELINE, *(name for name, *_ in step_time.FUSED), *PUBLISHED, "AdamW"]
    assert text.count("| tokens | " + " | ".join(names) + " |") == 2
    assert "torch " + torch.__version__ in text
    assert picture.read_bytes().startswith(b"\x89PNG")
