"""``zo-fused finetune`` and ``zo-fused replay`` end to end on a tiny random model, offline."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")
pytest.importorskip("datasets")

from safetensors.torch import load_file, save_file  # noqa: E402
from support.finetuned import TEXTS, Stop, assert_equal, assert_same_run, read, weights  # noqa: E402

import zo_fused  # noqa: E402
from zo_fused.cli import compare, defaults, runs  # noqa: E402
from zo_fused.cli.main import main  # noqa: E402
from zo_fused.sweeps.backends import cpu  # noqa: E402
from zo_fused.task import plan as plans  # noqa: E402
from zo_fused.task import run as a_run  # noqa: E402
from zo_fused.task.adapters import load_adapted  # noqa: E402
from zo_fused.task.console import Console, duration  # noqa: E402
from zo_fused.task.encoding import Encoder  # noqa: E402
from zo_fused.task.scoring import Scorer  # noqa: E402
from zo_fused.task.trainer import SKIPPED_IN_A_ROW  # noqa: E402

EXPECTED_MEMORY = a_run.expected_memory
pytestmark = pytest.mark.usefixtures("no_network", "quick")


@pytest.mark.parametrize(
    "more",
    [
        ("--method", "lozo", "--momentum", "0.9", "--interval", "2", "--lr-scheduler", "cosine"),
        ("--method", "mezo", "--weight-decay", "0.1", "--loss", "lm"),
        ("--method", "lozo", "--dtype", "bfloat16", "--lr-scheduler", "linear"),
        ("--method", "mezo", "--dtype", "float16"),
    ],
    ids=["lozo-m", "mezo-lm", "lozo-bf16", "mezo-fp16"],
)
def test_a_run_leaves_its_outputs_and_replays_bit_for_bit(arguments, base, tmp_path, capsys, more):
    assert main(arguments(*more)) == 0
    printed = capsys.readouterr().out
    assert "test accuracy" in printed
    assert "time per step" in printed
    out = tmp_path / "out"
    names = {path.name for path in out.iterdir()}
    assert names >= {"replay.jsonl", "history.jsonl", "curve.png", "summary.json", "config.json"}
    assert not [name for name in names if "checkpoint" in name or name.endswith(".tmp")]
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1  # who may read one, may all

    history = read(out / "history.jsonl")
    assert [e["step"] for e in history if "loss" in e] == [1, 2, 3, 4, 5, 6]
    assert [e["step"] for e in history if "dev_accuracy" in e] == [0, 3, 6]
    assert [e["step"] for e in history if "test_accuracy" in e] == [0, 6]
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["accuracy"]["test"].keys() == {"before", "after"}
    assert summary["seconds_per_step"]["forward"] > 0

    dtype = more[more.index("--dtype") + 1] if "--dtype" in more else "float32"
    tuned = weights(out)
    assert {str(t.dtype) for t in tuned.values()} == {f"torch.{dtype}"}
    started = {name: value.to(tuned[name].dtype) for name, value in weights(base).items()}
    assert any(not torch.equal(tuned[name], started[name]) for name in tuned)

    log, again = str(out / "replay.jsonl"), tmp_path / "again"
    replay = ["replay", "--model", str(base), "--log", log]
    assert main([*replay, "--output", str(again), "--verify", str(out)]) == 0
    assert "equal: all" in capsys.readouterr().out
    assert_equal(weights(again), tuned)
    assert transformers.AutoTokenizer.from_pretrained(again)("It was")["input_ids"]


METHODS = [
    ("mezo", "--queries", "3", "--distribution", "rademacher"),
    ("mezo", "--one-sided", "--queries", "2"),
    ("mezo", "--prior", "greedy", "--pool", "3"),
    ("mezo", "--prior", "survivor"),
    ("mezo-m", "--blocks", "sequential"),
    ("lozo", "--blocks", "simultaneous"),
    ("lozo", "--schedule", "paired"),
    ("lozo-m", "--schedule", "factored"),
    ("lozo-m", "--one-sided"),
    ("zo-adam",),
    ("zo-adam", "--history", "2"),
    ("zo-sign", "--blocks", "simultaneous", "--one-sided"),
    ("zo-conservative", "--distribution", "rademacher"),
    ("forward-grad", "--queries", "2"),
]


@pytest.mark.parametrize("words", METHODS, ids=" ".join)
def test_every_method_keeps_to_its_budget(arguments, base, tmp_path, capsys, words):
    """The forward passes that are counted are those that the plan was made with."""
    method, *more = words
    rest = arguments()
    at = rest.index("--steps")
    del rest[at : at + 2]
    assert main([*rest, "--method", method, *more, "--forwards", "29", "--lr", "1e-4"]) == 0
    assert "forward passes" in capsys.readouterr().out
    out = tmp_path / "out"
    summary = json.loads((out / "summary.json").read_text())
    settings = summary["settings"]
    each = 5 if method == "zo-conservative" else settings["queries"]
    if method not in ("zo-conservative", "forward-grad"):
        each *= 4 if settings["blocks"] == "simultaneous" else 1
        each = each + 1 if settings["one_sided"] else 2 * each
        each += 2 if settings.get("prior") else 0  # of three, one is a side of the query
    assert summary["steps"] == 29 // each
    assert summary["forwards"] == 29 // each * each
    history = read(out / "history.jsonl")
    assert {e["forwards"] for e in history if "loss" in e} == {each}
    evaluated = [e["step"] for e in history if "dev_accuracy" in e]
    apart = max(1, round(2 * 3 / each))  # three steps of two forward passes
    assert evaluated == sorted({*range(0, summary["steps"], apart), summary["steps"]})
    count = sum(p.numel() for p in transformers.OPTForCausalLM.from_pretrained(base).parameters())
    assert summary["parameters"] == count
    assert (summary["state_bytes"] >= 8 * count) == (words == ("zo-adam",))
    replay = ["replay", "--model", str(base), "--log", str(out / "replay.jsonl")]
    assert main([*replay, "--verify", str(out)]) == 0


def test_a_budget_too_small_for_a_step(arguments, capsys):
    rest = arguments()
    at = rest.index("--steps")
    del rest[at : at + 2]
    assert main([*rest, "--forwards", "4", "--method", "zo-conservative"]) == 2
    assert (
        "the budget of 4 forward passes is too small for a step, which" in capsys.readouterr().err
    )


QZO = ("--method", "qzo", "--lr", "1e-7", "--eps", "3e-5")


@pytest.mark.filterwarnings("default")  # of torchao
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scales_are_tuned_resumed_and_replayed(
    arguments, base, tmp_path, monkeypatch, capsys, dtype
):
    pytest.importorskip("torchao")
    whole, out = tmp_path / "whole", tmp_path / "out"
    more = (*QZO, "--dtype", dtype)
    assert main(arguments(*more, "--quantize", "int8", output=whole)) == 0
    with monkeypatch.context() as patch:

        def kill():
            raise MemoryError("killed")  # like SIGKILL, nothing is saved

        Stop(patch, 10, kill)
        with pytest.raises(MemoryError):
            main(arguments(*more, "--quantize", "int8"))
    if dtype == "bfloat16":  # from the base, quantized again
        shutil.rmtree(out / "checkpoint-3")
    assert main(arguments(*more, "--quantize", "int8", "--resume")) == 0
    assert_same_run(whole, out)
    replay = ["replay", "--model", str(base), "--log", str(out / "replay.jsonl")]
    capsys.readouterr()
    if dtype != "float32":  # the base's
        assert main([*replay, "--quantize", "int8", "--verify", str(whole)]) == 2
        said = capsys.readouterr().err
        assert "other base weights than these" in said
        assert "--dtype must be that of the run" in said
    more_of_replay = ("--quantize", "int8", "--dtype", dtype, "--verify", str(whole))
    assert main([*replay, *more_of_replay]) == 0
    assert "bit for bit" in capsys.readouterr().out
    assert main([*replay, "--verify", str(whole)]) == 2
    assert "no parameter" in capsys.readouterr().err
    # a model directory that is quantized already
    more = ("--model", str(out), *more)
    assert main(arguments(*more, output=tmp_path / "more")) == 0
    capsys.readouterr()
    assert main(arguments(*more, "--quantize", "int8", output=tmp_path / "no")) == 2
    assert "is quantized already: leave out --quantize" in capsys.readouterr().err


def test_scales_that_are_not_there_are_not_tuned(arguments, base, monkeypatch, capsys):
    for words, why in (
        (QZO, "the model has no quantized layer, whose scales QZO would tune"),
        ((*QZO, "--peft", "lora"), "--peft and the method qzo exclude each other"),
        ((*QZO, "--blocks", "sequential"), "--blocks is no option of the method qzo"),
        (("--method", "mezo", "--quantize", "int8"), "--quantize is no option of the method mezo"),
        (("--method", "qzo", "--quantize", "int4"), "invalid choice: 'int4'"),
    ):
        assert main(arguments(*words)) == 2
        assert why in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    assert main(arguments(*QZO, "--quantize", "int8")) == 2
    assert "install it with `pip install 'torchao'`" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about what peft calls
@pytest.mark.parametrize(
    "words",
    [
        "lora --method lozo --interval 2",
        "lora --method mezo-m --dtype bfloat16",
        "lora --method forward-grad --distribution rademacher",
        "prefix --method mezo",
        "prefix --method lozo --dtype bfloat16 --loss lm",
        "prompt --method zo-adam --loss accuracy",
    ],
)
def test_an_adapter_is_tuned_resumed_and_replayed(
    arguments, base, tmp_path, monkeypatch, capsys, words
):
    scheme, *method = words.split()
    peft = pytest.importorskip("peft")
    more = ("--peft", scheme, "--seed", "5", *method)
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main(arguments(*more, output=whole)) == 0
    assert "the adapter, replay.jsonl" in capsys.readouterr().out
    tuned = load_file(whole / "adapter_model.safetensors")
    assert not (whole / "model.safetensors").exists()
    names = load_adapted(str(base), "float32", torch.device("cpu"), scheme, 5).state_dict()
    assert len(tuned) == sum("lora_" in name or "prompt_encoder" in name for name in names)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    assert peft.PeftModel.from_pretrained(model, whole).active_peft_config
    with monkeypatch.context() as patch:
        # in the third step's loss; forward-grad has one a step
        call = 3 if "forward-grad" in more else 7
        Stop(patch, call, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert main(arguments(*more)) == 130
    assert main(arguments(*more, "--resume")) == 0
    assert_same_run(whole, out)
    capsys.readouterr()
    log, new = str(out / "replay.jsonl"), tmp_path / "new"
    replay = ["replay", "--model", str(base), "--log", log]
    checks = ["--output", str(new), "--verify", str(out)]
    assert main([*replay, "--peft", scheme, *checks]) == 0
    assert "equal: all" in capsys.readouterr().out
    assert_equal(
        load_file(new / "adapter_model.safetensors"), load_file(out / "adapter_model.safetensors")
    )
    assert main([*replay, "--output", str(tmp_path / "no")]) == 2
    assert "can't replay" in capsys.readouterr().err


def test_micro_batches_change_a_run_by_rounding_alone(arguments, tmp_path):
    rates = ("--lr", "1e-4", "--loss", "lm", "--method", "mezo")
    assert main(arguments(*rates, output=tmp_path / "whole")) == 0
    assert main(arguments(*rates, "--micro-batch-size", "3", output=tmp_path / "parts")) == 0
    one, other = (read(tmp_path / name / "history.jsonl") for name in ("whole", "parts"))
    for a, b in zip(one, other, strict=True):
        assert a.get("forwards") == b.get("forwards")
        # a loss near 6, rounded a few times; the gradient is a difference of two over 2 eps
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), abs=1e-5)
        assert a.get("projected_grad", 0) == pytest.approx(b.get("projected_grad", 0), abs=1e-2)


def test_without_a_template(arguments, tmp_path, monkeypatch):
    seen = []
    original = Encoder.prompt_ids

    def prompt_ids(encoder, text):
        seen.append(text)
        return original(encoder, text)

    monkeypatch.setattr(Encoder, "prompt_ids", prompt_ids)
    assert main(arguments("--no-template", "--steps", "1")) == 0
    assert set(seen) == {text for texts in TEXTS.values() for text in texts}


def test_trackers_are_told_what_the_history_has(arguments, tmp_path, monkeypatch):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    assert main(arguments("--report-to", "tensorboard")) == 0
    assert len(list((tmp_path / "board").iterdir())) == 1  # nothing is told after the end
    board = reading.EventAccumulator(str(tmp_path / "board")).Reload()
    history = read(tmp_path / "out" / "history.jsonl")
    names = {"train/loss": "loss", "eval/accuracy": "dev_accuracy", "eval/loss": "dev_loss"}
    for name, here in (names | {"test/loss": "test_loss"}).items():
        told = [(event.step, event.value) for event in board.Scalars(name)]
        steps, values = zip(*((e["step"], e[here]) for e in history if here in e), strict=True)
        assert [step for step, _ in told] == list(steps)
        assert [value for _, value in told] == pytest.approx(values)  # float32 in the file
    rest = {"test/accuracy", "train/grad_norm", "train/learning_rate"}
    assert set(board.Tags()["scalars"]) == {*names, "test/loss"} | rest
    grads = [abs(entry["projected_grad"]) for entry in history if "projected_grad" in entry]
    told = [event.value for event in board.Scalars("train/grad_norm")]
    assert told == pytest.approx(grads)


def test_a_tracker_that_is_not_there(arguments, tmp_path, capsys):
    assert main(arguments("--report-to", "tensorbord")) == 2
    assert "--report-to tensorbord: transformers knows no such tracker" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def comparison(base, data, tmp_path):
    """Arguments of a short comparison."""

    def make(*more):
        words = f"compare --model {base} --train {data} --output {tmp_path / 'cmp'} --forwards 12"
        return [*words.split(), "--batch-size", "4", "--eval-steps", "2", *more]

    return make


@pytest.mark.slow
def test_a_comparison(comparison, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "cmp"
    assert main(comparison("--methods", "mezo:lr=1e-3,lozo", "--seeds", "0")) == 0
    printed = capsys.readouterr().out
    assert (out / "compare.md").read_text() in printed
    content = json.loads((out / "compare.json").read_text())
    assert [row["method"] for row in content["methods"]] == ["mezo:lr=1e-3", "lozo"]
    for row in content["methods"]:
        assert (row["steps"], row["forwards"], row["seeds"]) == (6, 12, [0])
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    before = (out / "lozo" / "seed-0" / "summary.json").stat().st_mtime_ns
    # one more method, which fails; what is finished stays
    assert main(comparison("--methods", "lozo,zo-adam:eps=-1", "--seeds", "0")) == 1
    printed, error = capsys.readouterr()
    assert error.startswith("zo-fused: zo-adam:eps=-1 with seed 0 failed: eps must be a finite")
    assert error.rstrip().endswith(f"see {out / 'zo-adam_eps=-1' / 'seed-0.log'}")
    assert error.count("\n") == 1
    assert "| lozo | 1e-06 | 6 | 12 |" in printed
    assert (out / "lozo" / "seed-0" / "summary.json").stat().st_mtime_ns == before
    monkeypatch.setattr(compare, "run_all", lambda _: [])
    assert main(comparison("--methods", "mezo", "--seeds", "3")) == 2
    assert "no run came to its end" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_a_comparison_ends_its_runs(comparison, monkeypatch, capsys, number):
    children = []

    def start(*_):
        child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
        children.append(child)
        os.kill(os.getpid(), number)
        return child

    monkeypatch.setattr(runs, "_start", start)
    assert main(comparison("--methods", "lozo,mezo", "--seeds", "1")) == 128 + number
    assert [child.returncode for child in children] == [-number]
    assert "; go on with `zo-fused compare --model" in capsys.readouterr().err
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


def test_ctrl_c_in_a_comparison(comparison, monkeypatch, capsys):
    calls = []

    class Child:
        """A run that ends when it is told to."""

        def poll(self):
            raise KeyboardInterrupt

        def send_signal(self, number):
            calls.append(number)

        def wait(self):
            calls.append("wait")

    monkeypatch.setattr(runs, "_start", lambda *_: Child())
    words = comparison("--methods", "lozo,mezo", "--seeds", "1")
    assert main(words) == 130
    assert calls == [signal.SIGINT, "wait"]
    error = capsys.readouterr().err
    assert "finished runs are kept, and the steps of the others; go on with `zo-fused" in error
    assert error.rpartition("`zo-fused ")[2].rstrip("`\n").split() == words


def test_verify_tells_what_differs(arguments, base, tmp_path, capsys):
    assert main(arguments()) == 0
    out = tmp_path / "out"
    changed = weights(out)
    name = "model.decoder.final_layer_norm.weight"
    changed[name][3] += 1e-6
    save_file(changed, out / "model.safetensors", metadata={"format": "pt"})
    verify = ["replay", "--model", str(base), "--log", str(out / "replay.jsonl"), "--verify"]
    capsys.readouterr()
    assert main([*verify, str(out)]) == 1
    printed = capsys.readouterr().out
    assert printed == f"different: 1 tensors of {out}\n{name}: 1 of 16 values differ\n"


def test_a_finished_run_is_not_overwritten_unasked(arguments, base, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("")
    assert main(arguments()) == 2
    assert "is not empty; add --overwrite" in capsys.readouterr().err
    assert main(arguments("--overwrite")) == 0
    assert main(arguments()) == 2
    assert "holds a finished run; add --overwrite" in capsys.readouterr().err
    assert main(arguments("--resume")) == 2
    assert "nothing to resume" in capsys.readouterr().err
    assert main(arguments("--overwrite", output=base)) == 2
    assert "base model's own directory" in capsys.readouterr().err


@pytest.mark.filterwarnings("error")
def test_losses_that_are_not_finite_stop_the_run(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Scorer, "loss", lambda *_: torch.tensor(float("nan")))
    assert main(arguments("--steps", "50")) == 2
    error = capsys.readouterr().err
    assert f"{SKIPPED_IN_A_ROW} steps in a row were skipped, as a loss was not finite;" in error
    assert "Traceback" not in error
    history = read(tmp_path / "out" / "history.jsonl")
    assert [e["loss"] for e in history if "loss" in e] == [None] * SKIPPED_IN_A_ROW


def test_skipped_steps_are_reported(arguments, tmp_path, monkeypatch, capsys):
    original, calls = Scorer.loss, []

    def loss(scorer, batch, kind):
        calls.append(0)
        value = original(scorer, batch, kind)
        return value * float("inf") if len(calls) == 4 else value

    monkeypatch.setattr(Scorer, "loss", loss)
    assert main(arguments()) == 0
    assert "skipped" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["skipped_steps"] == 1


def test_the_first_lines_say_what_runs_where(arguments, capsys):
    assert main(arguments("--dtype", "bf16", "--steps", "1")) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("device cpu, 1 threads, backend ")
    backend = zo_fused.backend_of("cpu")
    assert f"backend {backend}{f' ({cpu.isa()})' if backend == 'cpu' else ''}," in first
    assert first.endswith("weights in bfloat16")
    assert second == "examples: 12 train, 12 dev, 12 test"


@pytest.mark.parametrize(
    ("words", "step"),
    [
        ("--method mezo --schedule plain", "2 forward passes, 3 sweeps over the weights"),
        ("--method mezo --schedule deferred", "2 forward passes, 2 sweeps over the weights"),
        ("--method lozo --schedule factored", "2 forward passes, beside the weights, which are"),
        ("--method zo-conservative", "5 forward passes"),
        ("--method mezo --blocks sequential", "2 forward passes"),
        ("--method forward-grad", "1 forward pass"),
    ],
)
def test_the_plan_is_told_before_the_first_step(
    arguments, base, tmp_path, monkeypatch, capsys, words, step
):
    monkeypatch.setattr(a_run, "expected_memory", EXPECTED_MEMORY)
    assert main(arguments(*words.split(), "--steps", "11", "--eval-steps", "20")) == 0
    lines = capsys.readouterr().out.splitlines()
    count = sum(p.numel() for p in transformers.OPTForCausalLM.from_pretrained(base).parameters())
    passes = json.loads((tmp_path / "out" / "summary.json").read_text())["forwards"]
    assert lines[2].endswith(
        f" of {count:,} parameters, 11 steps with 4 examples, {passes} forward passes"
    )
    assert lines[3].startswith(f"a step: {step}")
    told = lines[3].partition("memory: ")[2]
    assert told.startswith(f"weights {4 * count / 2**10:.0f} KiB, beside them ")
    assert "peak of a step about" in told
    assert lines[4].startswith("step 0: test accuracy")
    (time,) = [line for line in lines if line.startswith("step 10: ")]
    assert time.endswith("to the end")


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("queries", [1, 3])
def test_the_sweeps_of_a_step_are_those_that_it_makes(monkeypatch, deferred, one_sided, queries):
    options = {"deferred": deferred, "one_sided": one_sided, "queries": queries}
    optimizer = zo_fused.MeZO([torch.ones(3, requires_grad=True)], lr=0.1, **options)
    done = []
    for owner, name in ((optimizer.direction, "move"), (optimizer.rule, "apply")):
        original = getattr(owner, name)

        def sweep(*args, original=original):
            done.append(0)
            return original(*args)

        monkeypatch.setattr(owner, name, sweep)
    optimizer.step(lambda: 1.0)
    done.clear()
    optimizer.step(lambda: 1.0)
    assert plans.sweeps_of(optimizer, "plain") == f"{len(done)} sweeps over the weights"


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with Console(4, 1) as console:
        console.line("step 1: dev [accuracy] 0.5")
        console.step("loss 0.5, |g| [nan]")
    shown = capsys.readouterr().out
    assert "step 1: dev [accuracy] 0.5" in shown
    assert "2/4" in shown
    assert "loss 0.5, |g| [nan]" in shown


def test_a_duration_in_words():
    assert [duration(s) for s in (1.4, 89, 100, 5399, 11_100)] == [
        "1 s", "89 s", "2 min", "90 min", "3 h 5 min",
    ]  # fmt: skip


def test_a_config_makes_the_same_run(arguments, base, data, tmp_path):
    assert main(arguments("--schedule", "deferred")) == 0
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {base}\ntrain: {data}\noutput: {tmp_path / 'other'}\ndevice: cpu\nsteps: 9\n"
        "batch-size: 4\neval-steps: 3\nlr: 1e-3\nschedule: deferred\n"
    )
    assert main(["finetune", "--config", str(config), "--steps", "6"]) == 0
    assert_equal(weights(tmp_path / "out"), weights(tmp_path / "other"))


def test_prompts_that_are_cut_are_reported(arguments, tmp_path, capsys):
    assert main(arguments("--steps", "1", "--max-length", "14")) == 0
    printed = capsys.readouterr().out
    # half of the prompts have 14 tokens, the others 11, and an answer has one
    assert "prompts cut on the left to 14 tokens: 6 train, 6 dev, 6 test" in printed
    assert "prompts cut     6 train, 6 dev, 6 test" in printed
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["cut_prompts"] == {"train": 6, "dev": 6, "test": 6}
    assert summary["max_length"] == 14
    assert main(arguments("--steps", "1", "--overwrite")) == 0
    assert "prompts cut" not in capsys.readouterr().out
    for length, message in (("65", "the model takes 64 tokens at most, not 65"), ("2", "no room")):
        assert main(arguments("--overwrite", "--max-length", length)) == 2
        assert message in capsys.readouterr().err


def test_one_label_is_told_once(arguments, data, tmp_path, capsys):
    lines = (data / "train.jsonl").read_text().splitlines()[:3]
    alone = tmp_path / "alone.jsonl"
    alone.write_text("\n".join(lines))
    assert main(arguments("--dev", str(alone), "--steps", "1")) == 0
    error = capsys.readouterr().err
    assert error.startswith(
        "zo-fused: warning: only one label in dev ('negative'): nothing to tell"
    )
    assert error.count("\n") == 1


# ---- what the system refuses ---------------------------------------------------------------------


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def of_rust(*_, **__):
    raise RuntimeError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("target", "fault", "file"),
    [
        ("transformers.PreTrainedModel.save_pretrained", of_rust, "checkpoint-3.tmp"),
        ("torch.serialization._save", full, "checkpoint-3.tmp"),
        ("matplotlib.figure.Figure.savefig", full, "out"),
        ("os.write", full, "replay.jsonl"),
    ],
)
def test_a_full_disk_is_told_with_its_file(arguments, monkeypatch, capsys, target, fault, file):
    monkeypatch.setattr(target, fault)
    assert main(arguments()) == 2
    error = capsys.readouterr().err
    assert error.startswith("zo-fused: ")
    assert f"{file}: No space left on device; then go on with `zo-fused finetune " in error
    assert error.endswith("--resume`\n")
    assert error.count("\n") == 1


def test_a_folder_that_can_not_be_written(arguments, tmp_path, monkeypatch, capsys):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    assert main(arguments()) == 2
    assert f"the directory {tmp_path / 'out'} can't be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory: x")],
)
def test_no_memory_is_told_with_what_takes_less(arguments, monkeypatch, capsys, error):
    def loss(*_):
        raise error

    monkeypatch.setattr(Scorer, "loss", loss)
    assert main(arguments()) == 2
    message = capsys.readouterr().err
    assert f"there is not enough memory ({error}); --micro-batch-size, --max-length" in message
    assert message.count("\n") == 1
    monkeypatch.setattr(Scorer, "loss", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(arguments("--overwrite"))


def test_without_dev_and_test_a_run_just_trains(base, data, tmp_path, capsys):
    words = ["finetune", "--model", str(base), "--train", str(data / "train.jsonl")]
    task = ["--task", str(data / "task.json"), "--steps", "2", "--output", str(tmp_path / "out")]
    assert main([*words, *task]) == 0
    assert "accuracy" not in capsys.readouterr().out


def test_no_arguments_use_the_embedded_defaults(base, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(defaults, "EMBEDDED_MODEL", base)
    monkeypatch.setattr(defaults, "EMBEDDED_DATA", data)
    monkeypatch.setitem(defaults.EMBEDDED_COMMON, "steps", 2)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # the demo overwrites its own directory
        assert main(["finetune"]) == 0
    assert (tmp_path / "zo-fused-runs" / "demo" / "summary.json").is_file()
    assert main(["finetune", "--output", str(data)]) == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--train x.jsonl --task DATA/task.json", "there is no data file x.jsonl"),
        ("--train no/set --task DATA/task.json", "'no/set' is neither a data file nor"),
        ("--dev missing.jsonl", "there is no data file missing.jsonl"),
        ("--model ./missing", "there is no model directory ./missing"),
        ("--model no/such-model", "can't load the configuration of 'no/such-model'"),
        ("--model DATA", "is no model directory: it has no config.json"),
        ("--model DATA/task.json", "is a file, not a model directory"),
        ("--output DATA/task.json", "is a file, not a directory"),
        ("--output DATA/task.json/x", "can't make the directory"),
        ("--task missing.json", "can't read the task file missing.json"),
        ("--task DATA/task.json --template {text}", "need each other"),
        ("--label-field stars", "train.jsonl:1: no field 'stars'"),
        ("--template {title} --verbalizer a=x b=y", "train.jsonl:1: no field"),
        ("--template {text} --verbalizer a=x b=y", "label 'negative' has no answer"),
        ("--device quantum", "'quantum' is no device"),
        ("--device hpu", "there is no device 'hpu'"),
        ("--eps 0", "eps must be a finite number > 0"),
        ("--lr -1", "lr must be a finite number >= 0"),
        ("--momentum 1", "momentum must be a number in [0, 1)"),
        ("--resume", "nothing to resume"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_one_sentence(arguments, data, capsys, more, message):
    words = arguments(*[word.replace("DATA", str(data)) for word in more.split()])
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("zo-fused: ")
    assert error.count("\n") == 1
    assert not error.endswith(".\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there(arguments, capsys):
    assert main(arguments("--device", "cuda")) == 2
    assert "there is no device 'cuda': this PyTorch sees no GPU" in capsys.readouterr().err


def test_replay_mistakes(arguments, base, data, tmp_path, capsys):
    assert main(arguments()) == 0
    out, log = tmp_path / "out", tmp_path / "out" / "replay.jsonl"
    other = tmp_path / "other"
    shutil.copytree(base, other)
    values = weights(other)
    values["model.decoder.embed_tokens.weight"] += 1
    save_file(values, other / "model.safetensors", metadata={"format": "pt"})
    new = str(tmp_path / "new")
    for model, path, more, message in (
        (base, log, [], "give --output, --verify or both"),
        (base, log, ["--output", str(out)], "not an empty directory"),
        (base, "x.jsonl", ["--output", new], "can't read the replay log"),
        (base, data / "train.jsonl", ["--output", new], "not a zo_fused replay log"),
        (other, log, ["--output", new], "for other base weights"),
    ):
        capsys.readouterr()
        assert main(["replay", "--model", str(model), "--log", str(path), *more]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_as_a_process(arguments, tmp_path):
    program = "import sys; from zo_fused.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-P", "-c", program, *arguments()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "step 6: test accuracy" in done.stdout
    assert (tmp_path / "out" / "summary.json").is_file()
