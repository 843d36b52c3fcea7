"""The command line itself: parsing, help, errors, ``zo-fused doctor``. Needs torch alone."""

import argparse
import errno
import inspect
import io
import json
import os
import subprocess
import sys

import pytest

import zo_fused
from zo_fused.cli import compare, defaults, doctor, finetune
from zo_fused.cli.main import main, make_parser
from zo_fused.cli.method_help import of_one
from zo_fused.cli.method_options import OPTIONS, by_method
from zo_fused.methods.table import recipes
from zo_fused.task import errors
from zo_fused.task.files import writing


def parse(*words):
    return make_parser(["finetune"]).parse_args(["finetune", *words])


# ---- parsing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "arguments are required: COMMAND"),
        (["train"], "invalid choice: 'train'"),
        (["finetune", "--method", "adam"], "argument --method: invalid choice: 'adam'"),
        (["finetune", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["finetune", "--method", "lozzo-m"], "choice: 'lozzo-m' (did you mean lozo-m?)"),
        (
            ["finetune", "--method", "sgd"],
            "invalid choice: 'sgd' (choose from agzo, ",
        ),
        (["finetune", "--steps", str(10**30)], "--steps: must be a whole number >= 1, got '1000"),
        (["finetune", "--rank", str(2**31)], "argument --rank: must be below 2**31, got '2147"),
        (["finetune", "--seed", "9" * 5000], "argument --seed: must be a whole number below 2**64"),
        (["finetune", "--max-length", "0"], "--max-length: must be a whole number >= 1, got '0'"),
        (["finetune", "--loss", "mse"], "argument --loss: invalid choice: 'mse'"),
        (["finetune", "--steps", "0"], "--steps: must be a whole number >= 1, got '0'"),
        (["finetune", "--batch-size", "two"], "must be a whole number >= 1, got 'two'"),
        (["finetune", "--seed", "-1"], "must be a whole number below 2**64, got '-1'"),
        (["finetune", "--lr", "small"], "argument --lr: invalid float value: 'small'"),
        (["finetune", "--betas", "0.9"], "argument --betas: must look like 0.9/0.999, got '0.9'"),
        (["finetune", "--scale", "so"], "argument --scale: must be yes or no, got 'so'"),
        (["finetune", "--verbalizer", "great"], "must look like label=answer, got 'great'"),
        (["finetune", "--step", "3"], "unrecognized arguments: --step 3"),
        (["finetune", "--model", "m"], "--model needs --train"),
        (["finetune", "--dev", "d.jsonl"], "--dev and --test need --train"),
        (["finetune", "--output", ""], "argument --output: the name is empty"),
        (["finetune", "--output", "\udcff"], "--output: the name '\\udcff' is not UTF-8 text"),
        (["replay"], "arguments are required: --log"),
    ],
)
def test_mistakes_are_told_in_one_sentence(words, message, capsys):
    assert main(words) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("zo-fused: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--resume", "--overwrite"], "exclude each other"),
        (["--method", "mezo", "--rank", "4"], "--rank is no option of the method mezo"),
        (["--method", "zo-sign", "--momentum", "0.5"], "--momentum is no option of the method zo-"),
        (
            ["--history", "5"],
            "--history is no option of the method lozo (see `zo-fused finetune --method lozo --he",
        ),
        (["--method", "zo-conservative", "--one-sided"], "--one-sided is no option of the method"),
        (["--method", "forward-grad", "--eps", "1"], "--eps is no option of the method forward-"),
        (["--method", "forward-grad", "--loss", "accuracy"], "accuracy has no derivative, which"),
        (["--blocks", "sequential", "--schedule", "deferred"], "--blocks takes the schedule plain"),
        (["--blocks", "sequential", "--peft", "lora"], "--blocks and --peft exclude each other"),
        (["--steps", "3", "--forwards", "6"], "--steps and --forwards exclude each other"),
        (["--template", "{text}"], "--template and --verbalizer need each other"),
        (["--template", "{text}", "--verbalizer", "a=x", "a=y"], "has label 'a' twice"),
        (["--template", "{t}", "--verbalizer", "a=x", "b=y", "--task", "f"], "exclude each other"),
        ([], "no task: give --task, or --template and --verbalizer"),
    ],
)
def test_options_that_do_not_go_together(words, message, capsys):
    pytest.importorskip("transformers")
    assert main(["finetune", "--model", "m", "--train", "t.jsonl", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("--method MeZO", "mezo"),
        ("--method ZO-Adam", "zo-adam"),
        ("--method ZOAdam", "zo-adam"),
        ("--method LOZO_M", "lozo-m"),
        ("--method ZOSignSGD", "zo-sign"),
        ("--method ForwardGrad", "forward-grad"),
        ("--dtype bf16", "bfloat16"),
        ("--dtype FP16", "float16"),
        ("--dtype half", "float16"),
        ("--dtype torch.float32", "float32"),
        ("--dtype fp32", "float32"),
        ("--peft LoRA", "lora"),
    ],
)
def test_names_are_understood_however_they_are_written(words, meant):
    args = vars(parse(*words.split()))
    assert [value for value in args.values() if isinstance(value, str)] == [meant]


def test_options_not_given_get_the_defaults(tmp_path):
    task = tmp_path / "task.json"
    task.write_text('{"template": "{text}", "verbalizer": {"a": "x", "b": "y"}}')
    own = ["--model", "org/some-model", "--train", "t.jsonl", "--task", str(task)]
    options = finetune.options(parse(*own, "--method", "mezo", "--eps", "0.01"))
    assert options.hyper == {
        "lr": 1e-6, "eps": 0.01, "weight_decay": 0.0, "rounding": "nearest", "schedule": "deferred",
        "momentum": 0.0, "queries": 1, "one_sided": False, "distribution": "gaussian",
        "blocks": None, "prior": None, "pool": None, "dampening": 0.0, "state_dtype": "float32",
    }  # fmt: skip
    assert options.plan.steps == defaults.COMMON["steps"]
    assert options.sources == {"train": "t.jsonl"}
    assert options.output.parts == ("zo-fused-runs", "some-model-mezo")
    assert not options.overwrite
    (tmp_path / "test.jsonl").write_text("")
    options = finetune.options(parse("--model", "m", "--train", str(tmp_path), "--dev", "d"))
    assert options.sources == {"train": str(tmp_path), "dev": "d", "test": str(tmp_path)}
    common = {"lr", "eps", "weight_decay", "rounding", "schedule", "queries", "one_sided", "blocks"}
    of_lozo = {"rank", "interval", "momentum", "distribution"}
    of_lozo |= {"basis", "refresh", "others", "moments", "betas", "adam_eps", "divide_by_rank"}
    assert options.hyper.keys() == common | of_lozo
    assert options.task.answers == ("x", "y")


def test_answers_keep_their_spaces_and_equals_signs():
    assert parse("--verbalizer", "0= a", "1=b=c").verbalizer == [("0", " a"), ("1", "b=c")]


def test_defaults_cover_every_option():
    without = "command model train dev test task template verbalizer no_template method output "
    without += "resume overwrite forwards k train_examples dev_examples test_examples config preset"
    without += " report_to"
    options = set(vars(parse())) - set(without.split())
    seen = set()
    for method, own in by_method().items():
        set_by_recipe = recipes()[method][1].options.keys() - set(OPTIONS)
        seen |= own.keys() - set_by_recipe
        assert defaults.EMBEDDED_BY_METHOD[method].keys() <= own.keys() | {"steps"}
        for embedded in (False, True):
            table = defaults.defaults(method, embedded).keys() - set_by_recipe
            assert options - set(OPTIONS) <= table <= options
    assert seen == set(OPTIONS)


@pytest.mark.parametrize("method", by_method())
def test_the_table_has_the_arguments_of_the_optimizers(method):
    from zo_fused.task.optimizers import SCHEDULES

    optimizer, _ = recipes()[method]
    arguments = inspect.signature(optimizer).parameters.keys()
    table = by_method()[method]
    assert table.keys() - {"schedule", "blocks", "quantize"} <= arguments
    assert ("blocks" in table) == ("block_order" in arguments)
    assert ("quantize" in table) == optimizer.quantized
    assert SCHEDULES[table["schedule"]].keys() <= arguments


@pytest.mark.parametrize(
    ("method", "words", "value"),
    [
        ("hizoo", "--hessian-smooth 0.01", 0.01),
        ("p-gap", "--probes 3", 3),
        ("sparse-mezo", "--share 0.5", 0.5),
        ("sparse-mezo", "--mask random", "random"),
        ("kerzoo", "--kernel quintic", "quintic"),
        ("loren", "--lr-cov 0.01", 0.01),
        ("loren", "--rho 0.5", 0.5),
        ("conmezo", "--theta 1.2", 1.2),
        ("qzo", "--clip 10", 10.0),
        ("qzo", "--floor 0", 0.0),
        ("p-gap", "--delta 1/0.5", (1.0, 0.5)),
        ("p-gap", "--scale no", False),
        ("p-gap", "--align Joint", "joint"),
        ("p-gap", "--vector-lr 1e-4", 1e-4),
        ("zo-adam", "--betas 0.8,0.99", (0.8, 0.99)),
        ("zo-adam", "--adam-eps 1e-6", 1e-6),
        ("mezo-m", "--dampening 0.9", 0.9),
        ("mezo-m", "--state-dtype param", "param"),
        ("conmezo", "--warmup 0", 0),
        ("meazo", "--beta 0.9", 0.9),
        ("meazo", "--zeta 1e-6", 1e-6),
    ],
)
def test_what_a_method_alone_has_is_an_option(method, words, value):
    option, _ = words.split()
    options = finetune.options(parse("--method", method, *words.split()))
    assert options.hyper[option.strip("-").replace("-", "_")] == value


def test_some_options_change_the_defaults_of_others():
    assert defaults.defaults("lozo", False)["schedule"] == "factored"
    assert defaults.defaults("lozo", False, one_sided=True)["schedule"] == "deferred"
    assert defaults.defaults("lozo", False, blocks=True)["schedule"] == "plain"
    assert defaults.defaults("p-gap", True, peft="lora")["schedule"] == "plain"  # has no deferred
    lora = defaults.defaults("lozo", True, peft="lora")
    assert (lora["lr"], lora["eps"], lora["schedule"]) == (5e-5, 1e-2, "deferred")
    assert "eps" not in defaults.defaults("forward-grad", False, peft="prefix")


# ---- help, version, errors -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("commands", "loaded"),
    [
        ([["--help"], ["doctor", "--help"], ["replay", "--help"], ["evaluate", "--help"]], []),
        # their options are those of the methods
        (
            [["finetune", "--help"], ["compare", "--help"], ["finetune", "--method", "x"]],
            ["torch"],
        ),
    ],
    ids=["of all", "of methods"],
)
def test_help_loads_as_little_as_it_can(commands, loaded):
    program = (
        "import sys\n"
        "from zo_fused.cli.main import main\n"
        f"for words in {commands}:\n"
        "    try:\n"
        "        main(words)\n"
        "    except SystemExit as stop:\n"
        "        assert stop.code == 0\n"
        "print(sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0
    assert "finetune" in done.stdout
    assert ("--lr-scheduler" in done.stdout) == bool(loaded)
    assert done.stdout.endswith(f"{loaded}\n")
    assert done.stderr.count("\n") == len(loaded)  # the mistake


def help_of(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main(["finetune", *words, "--help"])
    assert stop.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_of_a_method_has_its_options_and_defaults(capsys):
    told = help_of(capsys, "--method", "SeeZO")
    assert "learning rate (default: 0.0003; on the embedded model: 0.002; --peft lora: 5e" in told
    assert "random directions a step, averaged (default: 8)" in told
    assert "(default: factored; on the embedded model: deferred; with --peft or --one-sid" in told
    assert "--interval INTERVAL" not in told
    assert "--population POPULATION" not in told
    told = help_of(capsys, "--method", "qzo")
    assert "(default: 0.001; on the embedded model: 0.0001)" in told  # no adapters


def test_help_says_which_method_has_another_default(capsys):
    told = help_of(capsys)
    for text in (
        "--method NAME --help, in this order, shows what a method takes, with its own defaults",
        "learning rate (default: by method; lozo: 1e-06)",
        "a step, averaged (default: 1; fzoo, seezo: 8; loren: 5; zo-mopi, zo-muon: 4)",
        "es: members of a step (default: 30)",
        "place of --interval (default: once; agzo: 50)",
        "--steps STEPS (default: 20000; on the embedded model: 600)",
    ):
        assert text in told
    assert " or 0.0" not in told


@pytest.mark.parametrize("method", by_method())
def test_help_has_a_word_for_every_default(method):
    for option in OPTIONS:
        text = of_one(option, method)
        assert (text == argparse.SUPPRESS) == (option not in by_method()[method])
        assert "None" not in text
        assert "True" not in text


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"zo-fused {zo_fused.__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "mezo,adam"], "argument --methods: invalid choice: 'adam' (did you mean"),
        (["--methods", "MeZO:queries=2,mezo:queries=2"], "--methods has 'mezo:queries=2' twice"),
        (["--methods", "mezo:steps=3"], "--methods: 'steps' in 'mezo:steps=3' is no option of a"),
        (["--methods", "mezo:rank=3"], "--rank is no option of the method mezo"),
        (["--methods", "mezo:lr=x"], "argument --lr: invalid float value: 'x'"),
        (["--methods", "mezo,lozo,mezo"], "--methods has 'mezo' twice"),
        (["--seeds", "0,0"], "--seeds has 0 twice"),
        (["--seeds", "0,x"], "argument --seeds: must be a whole number below 2**64, got 'x'"),
        (["--train", "EMBEDDED/train.jsonl", "--task", "EMBEDDED/task.json"], "needs --dev data"),
    ],
)
def test_comparisons_that_can_not_be(words, message, tmp_path, capsys):
    pytest.importorskip("transformers")
    output = tmp_path / "out"
    words = [word.replace("EMBEDDED", str(defaults.EMBEDDED_DATA)) for word in words]
    assert main(["compare", "--output", str(output), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not output.exists()


def test_options_reach_every_run_of_a_comparison(tmp_path):
    pytest.importorskip("transformers")
    given = ["--no-template", "--batch-size", "3", "--verbalizer", "0= a", "1=b=c"]
    args = make_parser(["compare"]).parse_args(["compare", "--template", "{text} So", *given])
    shared = compare._shared_words(args)
    again = parse(*shared)
    assert (again.template, again.verbalizer) == ("{text} So", [("0", " a"), ("1", "b=c")])
    assert (again.no_template, again.batch_size, again.lr) == (True, 3, None)
    args = make_parser(["compare"]).parse_args(["compare", "--batch-size", "3"])
    shared = compare._shared_words(args)
    methods = ["mezo:queries=4:one-sided", "lozo"]
    runs = compare.make_runs(methods, [0, 7], shared, tmp_path)
    assert [(run.method, run.seed) for run in runs] == [(m, s) for s in (0, 7) for m in methods]
    options = finetune.options(parse(*runs[2].words[1:]))
    assert (options.hyper["queries"], options.hyper["one_sided"]) == (4, True)
    assert (options.plan.seed, options.plan.batch_size) == (7, 3)
    assert len({run.output for run in runs} | {run.log for run in runs}) == 8
    compare.make_runs(["zo-adam"], [0], shared, tmp_path)  # methods can be added
    with pytest.raises(errors.UserError, match="holds a comparison with other options"):
        compare.make_runs(methods, [0], ["--batch-size=4"], tmp_path)


@pytest.mark.parametrize("package", ["transformers", "datasets"])
def test_a_missing_package_is_named(package, monkeypatch, capsys, tmp_path):
    pytest.importorskip("transformers")
    monkeypatch.setitem(sys.modules, package, None)
    task = tmp_path / "task.json"
    task.write_text('{"template": "{text}", "verbalizer": {"a": "x", "b": "y"}}')
    words = ["--model", "m", "--train", "org/set", "--task", str(task)]
    assert main(["finetune", *words, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert f"needs the package '{package}'" in error
    assert "pip install 'zo-fused[hf]'" in error
    assert error.count("\n") == 1


def test_unexpected_errors_keep_their_traceback(monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(doctor, "run", broken)
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device", "out/x"), "out/x: No space left on device"),
        (OSError(5, "Input/output error"), "Input/output error"),
        (OSError("The log was changed."), "The log was changed"),
        (PermissionError(13, "Permission denied", b"x"), "b'x': Permission denied"),
    ],
)
def test_what_the_system_refuses_is_a_sentence(monkeypatch, capsys, error, message):
    def refused(*_):
        raise error

    monkeypatch.setattr(doctor, "run", refused)
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == f"zo-fused: {message}\n"


def test_nobody_reads_the_output():
    """As in ``zo-fused doctor | head``: no word of it, neither from here nor when Python ends."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "zo_fused.cli.main", "doctor"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_output_that_has_no_letters_for_a_path(monkeypatch):
    monkeypatch.setattr(doctor, "run", lambda *_: print("é \udcff"))
    raw = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
        main(["doctor"])
        assert raw.getvalue() == b"\\xe9 \\udcff\n"


def test_errors_of_libraries_that_hide_what_the_system_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(OSError, match="No space left") as caught, writing(path):
        raise RuntimeError("Error while serializing: I/O error (os error 28)")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    hidden = RuntimeError("unexpected pos 704 vs 598")  # as of torch.save
    hidden.__context__ = OSError(errno.ENOSPC, "No space")
    with pytest.raises(OSError, match="No space left"), writing(path):
        raise hidden
    with pytest.raises(RuntimeError, match="a bug"), writing(path):
        raise RuntimeError("a bug")


def test_ctrl_c_outside_the_loop(monkeypatch, capsys):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "run", stopped)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "zo-fused: interrupted\n"


def test_first_line_of_a_foreign_message():
    assert errors.first_line(ValueError("\n It broke.\nMore")) == "It broke"
    assert errors.first_line(ValueError()) == "ValueError"


# ---- doctor --------------------------------------------------------------------------------------


def test_doctor_tells_what_serves_what(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in ("zo_fused", "torch", "triton", "transformers", "devices", "backends", "reference"):
        assert word in text
    assert f"backend {zo_fused.backend_of('cpu')}" in text
    assert not [line for line in text.splitlines() if line != line.rstrip()]


def test_doctor_for_programs(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["zo_fused"] == zo_fused.__version__
    assert found["devices"]["cpu"]["backend"] == zo_fused.backend_of("cpu")
    assert found["backends"]["reference"]["cpu"] is None
    assert found["cpp_extension"] in (None, "portable", "avx2", "avx512")
    assert found["cuda_extension"] is None or "9.0" in found["cuda_extension"]


def test_doctor_says_for_what_the_cuda_extension_is_built(monkeypatch, capsys):
    from zo_fused.sweeps.backends import cuda

    monkeypatch.setattr(cuda, "architectures", lambda: [(8, 0), (9, 0)])
    assert main(["doctor"]) == 0
    assert "CUDA extension  built for 8.0, 9.0" in capsys.readouterr().out


def test_doctor_says_what_to_do(monkeypatch, capsys):
    from zo_fused.sweeps import dispatch
    from zo_fused.sweeps.backends import cuda

    def why_not(backend, device_type):
        if backend == "triton":
            raise OSError("libsomething.so is missing")
        return None if backend == "reference" else "the C++ extension is not built; build it"

    monkeypatch.setattr(dispatch, "why_not", why_not)
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    monkeypatch.setattr(cuda, "architectures", list)
    monkeypatch.setenv("ZO_FUSED_BACKEND", "reference")
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "triton on cpu: OSError: libsomething.so is missing" in text
    assert "C++ extension   not built" in text
    assert "CUDA extension  not built" in text
    assert "- on CPUs the slow reference serves: the C++ extension is not built; build it" in text
    assert "`zo-fused finetune` lacks transformers, datasets, tqdm, matplotlib" in text
    assert "every call is sent to ZO_FUSED_BACKEND=reference" in text
    monkeypatch.setattr(dispatch, "why_not", lambda *_: "broken")
    assert main(["doctor"]) == 1
