"""Options from files: ``--config``, ``--preset`` and ``zo-fused init``."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("yaml")

from zo_fused.cli import compare, defaults, init
from zo_fused.cli.config import PRESETS, merged, presets
from zo_fused.cli.main import main
from zo_fused.cli.method_options import OPTIONS, by_method
from zo_fused.cli.run_options import run_parser


def options(*words):
    """The merged arguments of a command line."""
    parser = run_parser()
    return merged(parser, parser.parse_args(words))


@pytest.fixture
def config(tmp_path):
    """Writes a config; returns the word that names it."""

    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return f"--config={path}"

    return write


def assert_refused(words, message, capsys):
    """In one sentence."""
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_values_are_those_of_the_command_line(config):
    word = config("""
method: MeZO
lr: 1e-6
batch_size: 8
eval-steps: 20  # either way of writing it
one-sided: true
no-template: false
template: "{text} It was"
verbalizer:
  no: " terrible"
  1: " great"
seed: 18446744073709551615
output:
""")
    words = ["--method", "mezo", "--lr", "1e-6", "--batch-size", "8", "--eval-steps", "20"]
    words += ["--one-sided", "--template", "{text} It was", "--seed", f"{2**64 - 1}"]
    words += ["--verbalizer", "no= terrible", "1= great"]
    found, expected = vars(options(word)), vars(options(*words))
    assert found.pop("config") is not None
    assert expected.pop("config") is None
    assert found == expected


def test_the_command_line_goes_before_a_config_and_that_before_a_preset(config):
    word = config("preset: lozo-opt13b-sst2\nlr: 2e-7\nrank: 4\n")
    found = options(word, "--rank", "8")
    assert (found.rank, found.lr, found.interval, found.method) == (8, 2e-7, 50, "lozo")
    assert found.steps == 20_000
    assert options("--preset", "mezo-opt13b-sst2", word).method == "mezo"


@pytest.mark.parametrize("pair", ["0.8/0.9", "0.8,0.9", "[0.8, 0.9]"])
def test_two_numbers(pair, config):
    assert options(config(f"betas: {pair}")).betas == (0.8, 0.9)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("tensorboard, trackio,", ("tensorboard", "trackio")),
        ("wandb,wandb", ("wandb",)),
        ("none", ()),
        ("", ()),
    ],
)
def test_trackers_are_named_once_or_none_is(text, names, config):
    assert options(f"--report-to={text}", config("report-to: mlflow")).report_to == names


def test_one_budget_takes_the_place_of_another(config):
    found = options(config("preset: lozo-opt13b-sst2\nforwards: 100"))
    assert (found.steps, found.forwards) == (None, 100)
    found = options(config("forwards: 100"), "--steps", "5")
    assert (found.steps, found.forwards) == (5, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: fast", "run.yaml: argument --lr: invalid float value: 'fast'"),
        ("steps: 0", "run.yaml: argument --steps: must be a whole number >= 1"),
        ("bach-size: 1", "run.yaml: there is no option 'bach-size'; did you mean 'batch-size'?"),
        ("overwrite: true", "run.yaml: overwrite belongs on the command line"),
        ("resume: true", "argument --resume: invalid choice: 'true' (choose from 'auto')"),
        ("config: x", "run.yaml: config belongs on the command line"),
        ("one-sided: maybe", "run.yaml: one-sided must be true or false, not 'maybe'"),
        ("lr: {1: 2}", "run.yaml: lr must be one value"),
        ("verbalizer: great", "run.yaml: verbalizer must be a mapping"),
        ("- lr", "run.yaml: not a mapping of options"),
        ("lr: 1\nlr: [", "run.yaml:2: not YAML ("),
        ("lr: 1e-6\nlr: 1e-7", "run.yaml:2: not YAML ('lr' stands there twice)"),
        ("verbalizer: {0: ' a', 1: ' b', 0: ' c'}", "('0' stands there twice)"),
        ("batch-size: 2\nbatch_size: 4", "run.yaml: batch-size and batch_size are one option"),
        ("verbalizer: {0: [' bad'], 1: ' good'}", "run.yaml: verbalizer must be a mapping"),
        ("verbalizer: []", "run.yaml: verbalizer must be a mapping"),
        ("verbalizer: {x=y: ' a', z: ' b'}", "run.yaml: verbalizer has a label with '=', 'x=y'"),
        ("dev: null", "run.yaml: dev has null as its value; put nothing there instead"),
        ("output: [a, b]", "run.yaml: output must be one value"),
        ("preset: mezo", "run.yaml: argument --preset: invalid choice: 'mezo'"),
    ],
)
def test_mistakes_in_a_config_are_told_in_one_sentence(config, capsys, text, message):
    assert_refused(["finetune", config(text)], message, capsys)


def test_a_comparison_reads_its_options_from_a_file(config, tmp_path, monkeypatch, capsys):
    file = """
methods: [mezo, "lozo:rank=4"]
seeds: 3, 5
forwards: 12
batch-size: 4
report-to: [tensorboard, wandb]
verbalizer: {0: " bad", 1: " good"}
template: "{text} It was"
"""
    made = []
    monkeypatch.setattr(compare, "run_all", lambda runs: made.extend(runs) or [])
    word = config(file + f"output: {tmp_path / 'out'}\n")
    assert main(["compare", word, "--seeds", "3", "--batch-size", "8"]) == 2
    assert "no run came to its end" in capsys.readouterr().err
    assert [(run.method, run.seed) for run in made] == [("mezo", 3), ("lozo:rank=4", 3)]
    assert {run.output.parent.parent for run in made} == {tmp_path / "out"}
    found = options(*made[1].words[1:])
    assert (found.rank, found.batch_size, found.forwards) == (4, 8, 12)
    assert found.report_to == ("tensorboard", "wandb")
    assert found.verbalizer == [("0", " bad"), ("1", " good")]
    capsys.readouterr()
    assert main(["compare", word, "--batch-size", "8", "--report-to", "none"]) == 2
    assert "no run came to its end" in capsys.readouterr().err  # trackers make no other comparison
    assert main(["compare", word, "--batch-size", "4"]) == 2
    assert "holds a comparison with other options" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 1e-6", "run.yaml: lr is a method's: methods: lozo:lr=VALUE"),
        ("one_sided: true", "run.yaml: one_sided is a method's: methods: lozo:one-sided"),
        ("method: lozo", "run.yaml: method is one of several: methods: lozo,mezo"),
        ("steps: 10", "run.yaml: steps is not the same for all methods: forwards: 1000"),
        ("overwrite: true", "run.yaml: overwrite is of one run"),
        ("seeds: x", "run.yaml: argument --seeds: must be a whole number"),
        ("sed: 1", "run.yaml: there is no option 'sed'; did you mean 'seeds'?"),
    ],
)
def test_what_a_comparison_has_in_another_place(config, capsys, text, message):
    assert_refused(["compare", config(text)], message, capsys)


def test_a_config_that_is_not_there(tmp_path, capsys):
    assert main(["finetune", "--config", str(tmp_path / "x.yaml")]) == 2
    assert "x.yaml: No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize("name", presets())
def test_a_preset_names_its_source_and_has_options_of_its_method(name):
    found = options("--preset", name)
    comments = re.findall("^#.*", (PRESETS / f"{name}.yaml").read_text(), re.MULTILINE)
    assert "arXiv" in comments[0]
    assert any("https://github.com/" in line for line in comments[1:])
    own = by_method()[found.method]
    assert all(name in own for name in OPTIONS if getattr(found, name) is not None)
    assert found.task.startswith("mezo_")
    assert found.model


@pytest.mark.parametrize("method", ["lozo", "mezo", "qzo", "es", "p-gap"])
def test_init_writes_every_option_with_its_default(method, tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    assert main(["init", str(path), "--method", method]) == 0
    assert f"zo-fused finetune --config {path}" in capsys.readouterr().out
    as_it_is = vars(options(f"--config={path}"))
    assert {name: v for name, v in as_it_is.items() if v not in (None, False)} == {
        "config": path,
        "method": method,
    }
    path.write_text(re.sub(r"^#(?=[a-z-]+: [^ ])", "", path.read_text(), flags=re.MULTILINE))
    found, table = options(f"--config={path}"), defaults.defaults(method, embedded=False)
    set_here = {name for name, value in vars(found).items() if value is not None}
    assert {name for name, value in table.items() if value is not None} - set_here <= {
        name for name, value in table.items() if value is False
    }
    for name in set_here & table.keys():
        assert getattr(found, name) == table[name], name
    options_of_it = {line.split(":")[0] for line in init.text(method).splitlines()}
    assert {f"#{name.replace('_', '-')}" for name in by_method()[method]} <= options_of_it


def test_init_copies_a_preset_and_overwrites_nothing(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    assert main(["init", str(path), "--preset", "mezo-opt13b-sst2"]) == 0
    assert path.read_bytes() == (PRESETS / "mezo-opt13b-sst2.yaml").read_bytes()
    assert main(["init", str(path)]) == 2
    assert "run.yaml is there already" in capsys.readouterr().err
    assert main(["init", "x.yaml", "--preset", "mezo-opt13b-sst2", "--method", "es"]) == 2
    assert "--preset and --method exclude each other" in capsys.readouterr().err
