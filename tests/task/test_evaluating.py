"""`zo-fused evaluate`: lm_eval's numbers are finetune's, on the same examples, and its prompts are
those of MeZO's code."""

import importlib.util
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("needs lm_eval: `make test-tasks` installs it", allow_module_level=True)
transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from support import tiny_models  # noqa: E402
from support.tiny_models import roberta_tokenizer  # noqa: E402

from zo_fused.cli.defaults import EMBEDDED_DATA, EMBEDDED_MODEL  # noqa: E402
from zo_fused.cli.main import main  # noqa: E402
from zo_fused.task.data import read_examples  # noqa: E402
from zo_fused.task.encoding import Encoder  # noqa: E402
from zo_fused.task.errors import UserError  # noqa: E402
from zo_fused.task.evaluating import Evaluator, of_lm_task  # noqa: E402
from zo_fused.task.lm_tasks import LmTask  # noqa: E402
from zo_fused.task.prompt import Task  # noqa: E402
from zo_fused.task.scoring import Scorer  # noqa: E402
from zo_fused.task.splits import Draw, shuffled  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of lm_eval and what it imports

DATA = Path(__file__).parents[1] / "data" / "tasks"


@pytest.fixture(scope="module")
def sst2(tmp_path_factory):
    """The embedded reviews as SST-2 has its sentences."""
    folder = tmp_path_factory.mktemp("sst2")
    for split in ("train", "test"):
        lines = (EMBEDDED_DATA / f"{split}.jsonl").read_text().splitlines()[:200]
        records = [json.loads(line) for line in lines]
        made = [{"sentence": r["text"], "label": int(r["label"] == "positive")} for r in records]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, made)))
    return folder


def evaluated(tmp_path, *words):
    """The rows that the command writes, by shots and metric."""
    output = tmp_path / "evaluated.json"
    words = ["evaluate", *words, "--device=cpu", f"--output={output}"]
    assert main([str(word) for word in words]) == 0
    made = json.loads(output.read_text())
    return {(row["shots"], row["metric"]): row for row in made["results"]}, made


# ---- the same examples, the same answers ---------------------------------------------------------


@pytest.mark.parametrize(
    ("peft", "lr", "eps"),
    [
        (None, "3e-3", "1e-3"),
        ("lora", "1", "0.01"),
        ("prefix", "30", "0.1"),
        ("prompt", "3", "0.1"),
    ],
)  # so large that answers change
def test_finetunes_accuracy_before_and_after(peft, lr, eps, sst2, tmp_path):
    """Of 60 examples out of 200: others would give another accuracy."""
    which = ["--task=mezo_sst2", f"--train={sst2}", "--test-examples=60", "--data-seed=5"]
    method = ["--method=mezo", f"--lr={lr}", f"--eps={eps}", "--steps=4", "--eval-steps=4"]
    method += [] if peft is None else [f"--peft={peft}"]
    size = ["--train-examples=20", "--dev-examples=2", "--batch-size=8", "--device=cpu"]
    tuned = tmp_path / "tuned"
    assert main(["finetune", *which, *method, *size, f"--output={tuned}"]) == 0
    want = json.loads((tuned / "summary.json").read_text())["accuracy"]["test"]
    assert want["before"] != want["after"]
    given = f"--model={tuned}" if peft is None else f"--adapter={tuned}"
    after, made = evaluated(tmp_path, given, *which)
    assert after[0, "acc"]["value"] == want["after"]
    assert made["model"] == str(tuned if peft is None else EMBEDDED_MODEL)
    assert made["adapter"] == (None if peft is None else str(tuned))
    if peft is None:
        before, made = evaluated(tmp_path, f"--model={EMBEDDED_MODEL}", *which)
        row = before[0, "acc"]
        share = row["value"]
        assert share == want["before"]
        assert row["standard_error"] == pytest.approx(math.sqrt(share * (1 - share) / 59))
        assert (row["task"], row["examples"], row["cut_prompts"]) == ("mezo_sst2", 60, 0)
        assert made["lm_eval"] == importlib.metadata.version("lm_eval")
        assert (made["data_seed"], made["dtype"]) == (5, "float32")


@torch.no_grad()
def test_the_embedded_model_on_its_data(model, tokenizer, tmp_path, capsys):
    """Without arguments; here of 100 examples. A template task draws as finetune draws."""
    rows, _ = evaluated(tmp_path, "--test-examples=100", "--data-seed=3")
    line = capsys.readouterr().out.splitlines()[1].split()
    task = Task.from_file(EMBEDDED_DATA / "task.json")
    examples = read_examples(str(EMBEDDED_DATA), task, "test")
    chosen = [examples[i] for i in shuffled(len(examples), 3)[:100]]
    encoder = Encoder(task, tokenizer, 256)
    scorer = Scorer(model, encoder.answers, pad_id=1)
    assert rows[0, "acc"]["value"] == scorer.evaluate(encoder.encode(chosen), 50).accuracy
    assert list(rows) == [(0, "acc")]
    assert line[:3] == ["embedded", "0", "acc"]
    assert line[-1] == "100"
    assert float(line[3]) == pytest.approx(rows[0, "acc"]["value"], abs=5e-5)


# ---- prompts -------------------------------------------------------------------------------------


class Recorder:
    """In the place of lm_eval's model: keeps what it is asked, and answers by the real one."""

    def __init__(self, evaluator, monkeypatch):
        self.asked = []
        for kind in ("loglikelihood", "generate_until"):
            monkeypatch.setattr(evaluator.lm, kind, self.keep(getattr(evaluator.lm, kind)))

    def keep(self, real):
        def ask(requests, **more):
            made = real(requests, **more)
            self.asked += [(*r.args, x) for r, x in zip(requests, made, strict=True)]
            return made

        return ask


def mezo_sets(size, tests, shots):
    """The demonstrations of each test example: sample_train_sets of MeZO's large_models/tasks.py,
    for a seed that is None."""
    np.random.seed(0)
    seeds = np.random.randint(0, 10000, tests)
    sets = []
    for seed in seeds:
        np.random.seed(seed)
        sets.append(np.random.permutation(size).tolist()[:shots])
    return sets


def test_demonstrations_are_mezos(model, tokenizer, sst2, monkeypatch):
    """A set of its own for each test example, in the order in which those are drawn."""
    task = LmTask("mezo_sst2", {"train": str(sst2), "test": str(sst2)})
    evaluator = Evaluator(model, tokenizer, 8)
    recorder = Recorder(evaluator, monkeypatch)
    subject = of_lm_task(task, Draw(test=12))
    evaluator.evaluate(subject, 3, False, 0)
    files = [(sst2 / f"{split}.jsonl").read_text().splitlines() for split in ("train", "test")]
    train, test = ([json.loads(line) for line in lines] for lines in files)
    np.random.seed(0)
    places = np.random.permutation(len(test)).tolist()[:12]  # sample_subset, seed 0
    want = []
    for place, chosen in zip(places, mezo_sets(len(train), 1000, 3), strict=False):
        shown = [f"{train[i]['sentence']} It was {('terrible', 'great')[train[i]['label']]}"
                 for i in chosen]  # fmt: skip
        want.append("\n\n".join([*shown, f"{test[place]['sentence']} It was"]))
    prompts = list(dict.fromkeys(prompt for prompt, _, _ in recorder.asked))
    assert len(prompts) == 12
    assert set(prompts) == set(want)
    assert [subject.test[i] for i in range(12)] == places


@pytest.mark.parametrize(
    ("name", "file", "shown"),
    [
        ("mezo_record", "super_glue_record", "After the race Reis thanked her trainer\n\n"),
        ("mezo_squad", "squad", "was the lighthouse of Skagen lit?\nAnswer: 1858\n\n"),
        ("mezo_copa", "super_glue_copa", "slipped from my hands so it broke on the floor.\n\n"),
        ("mezo_rte", "super_glue_rte", "is true? Yes or No?\nYes\n\n"),
    ],
)
def test_demonstrations_of_other_kinds(name, file, shown, model, tokenizer, monkeypatch):
    """Several right answers: the first; answers that are written; candidates of the record's."""
    path = str(DATA / f"{file}.jsonl")
    evaluator = Evaluator(model, tokenizer, 8)
    recorder = Recorder(evaluator, monkeypatch)
    task = LmTask(name, {"train": path, "test": path})
    rows = evaluator.evaluate(of_lm_task(task, Draw()), 2, False, 0)
    assert all(shown in prompt for prompt, _, _ in recorder.asked)
    generated = ["f1", "exact_match"]
    assert [row["metric"] for row in rows] == (
        generated if name == "mezo_squad" else ["acc", "acc_norm"]
    )


def test_prompts_that_lose_their_beginning_are_counted(sst2, tmp_path, capsys):
    """The embedded model takes 256 tokens."""
    words = ["--task=mezo_sst2", f"--train={sst2}", "--test-examples=4", "--shots=32,1"]
    rows, _ = evaluated(tmp_path, *words)
    assert list(rows) == [(32, "acc"), (32, "acc_norm"), (1, "acc"), (1, "acc_norm")]
    assert [row["cut_prompts"] for row in rows.values()] == [4, 4, 0, 0]
    error = capsys.readouterr().err
    told = "4 of 4 prompts of mezo_sst2 with 32 demonstrations lost their beginning: the model "
    assert error.count("lost their beginning") == 1
    assert f"warning: {told}takes 256 tokens" in error


# ---- calibration ---------------------------------------------------------------------------------


@torch.no_grad()
def test_calibration_by_the_answers_own_likelihood(model, tokenizer, sst2, monkeypatch):
    task = LmTask("mezo_sst2", {"train": str(sst2), "test": str(sst2)})
    evaluator = Evaluator(model, tokenizer, 8)
    recorder = Recorder(evaluator, monkeypatch)
    rows = evaluator.evaluate(of_lm_task(task, Draw(test=80)), 0, True, 0)
    value = {row["metric"]: row["value"] for row in rows}
    assert value.keys() == {"acc", "acc_norm", "acc_mutual_info"}
    scores, own = {}, {}
    for prompt, answer, (score, _) in recorder.asked:
        (own if prompt == "" else scores.setdefault(prompt, {}))[answer] = score
    # after the token that texts begin with, and no other
    start = torch.tensor([[tokenizer.bos_token_id]])
    logs = model(input_ids=start).logits[0, -1].log_softmax(-1)
    for answer in (" terrible", " great"):
        (token,) = tokenizer(answer, add_special_tokens=False)["input_ids"]
        assert own[answer] == pytest.approx(float(logs[token]), abs=1e-4)
    lines = (sst2 / "test.jsonl").read_text().splitlines()
    label = {r["sentence"] + " It was": r["label"] for r in map(json.loads, lines)}

    def accuracy(of):
        hits = [(of(s, " great") > of(s, " terrible")) == label[p] for p, s in scores.items()]
        return sum(hits) / len(hits)

    assert len(scores) == 80
    assert value["acc"] == accuracy(lambda s, a: s[a])
    assert value["acc_mutual_info"] == accuracy(lambda s, a: s[a] - own[a])
    assert value["acc_mutual_info"] != value["acc"]


@pytest.mark.parametrize(("name", "file"), [("mezo_record", "super_glue_record"),
                                            ("mezo_squad", "squad")])  # fmt: skip
def test_what_can_not_be_calibrated(name, file, model, tokenizer):
    path = str(DATA / f"{file}.jsonl")
    subject = of_lm_task(LmTask(name, {"train": path, "test": path}), Draw())
    with pytest.raises(UserError, match=f"--calibrated is for tasks .* which {name} is not"):
        Evaluator(model, tokenizer, 8).evaluate(subject, 0, True, 0)


# ---- mistakes ------------------------------------------------------------------------------------


def test_answers_that_lm_eval_would_hold_for_wrong(tmp_path):
    """Numbers out of a table are texts, and a hidden label is none."""
    table, hidden = tmp_path / "test.csv", tmp_path / "hidden.jsonl"
    table.write_text('sentence,label\n"a film",1\n"no film",0\n')
    hidden.write_text('{"sentence": "a film", "label": 1}\n{"sentence": "a film", "label": -1}')
    with pytest.raises(UserError, match=r"its answer '[01]' is a text, as it is in tables, and"):
        of_lm_task(LmTask("mezo_sst2", {"train": str(table), "test": str(table)}), Draw())
    with pytest.raises(UserError, match=r"row 2: .*its answer -1 is none of the 2 candidates"):
        of_lm_task(LmTask("mezo_sst2", {"train": str(hidden), "test": str(hidden)}), Draw())


SST2 = str(DATA / "glue_sst2.jsonl")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model=x"], "no task: give --task, or a folder with task.json and data as --train"),
        (["--task=mezo_sst2", f"--train={SST2}"], "--train needs --test: the former is for demo"),
        (
            ["--task=mezo_sst2", f"--test={SST2}", "--shots=0,2"],
            "--shots needs --train, the data that demonstrations are drawn from",
        ),
        (
            ["--task=mezo_sst2", f"--train={SST2}", f"--test={SST2}", "--shots=5"],
            "there are 4 training examples of mezo_sst2 to take 5 demonstrations from",
        ),
        (["--task=a", "--task=b", f"--test={SST2}"], "--train and --test are of one --task"),
        (
            ["--task=mezo_roberta_sst2", f"--test={SST2}"],
            "the prompts of mezo_roberta_sst2 have a mask, which lm_eval can't fill in",
        ),
        ([f"--task={EMBEDDED_DATA / 'task.json'}"], "task.json needs --test, its data"),
        (["--output=none/x.json"], "can't write none/x.json: there is no directory none"),
        (["--output=."], "can't write .: it is a directory"),
        (["--shots=two"], "must be numbers such as 0 or 0,32, got 'two'"),
        (
            ["--task=mezo_sst2", f"--test={SST2}", f"--adapter={EMBEDDED_MODEL}"],
            "is no directory of an adapter: no adapter_config.json",
        ),
    ],
)
def test_mistakes_are_told_in_one_sentence(words, message, capsys):
    assert main(["evaluate", *words]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("zo-fused: ")]
    assert len(told) == 1
    assert message in told[0]


OWN = """
training_split: train
test_split: test
doc_to_text: "{{sentence}}"
output_type: multiple_choice
doc_to_choice: [bad, good]
doc_to_target: label
"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((), None),
        (("multiple_choice", "generate_until"), "lm_eval can't evaluate own: Invalid config"),
        (("{{sentence}}", "{{text}}"), "data 'json' (UndefinedError: 'text' is undefined)"),
        (("doc_to_target: label", ""), "own.yaml and its data 'json' (TypeErr"),
        (("doc_to_text", "doc_to_txt"), "own.yaml and its data 'json' (TypeErr"),
        (("test: ", "test: x"), "data 'json' (FileNotFoundError: Unable to find"),
    ],
)
def test_a_file_that_lm_eval_can_not_use(change, message, sst2, tmp_path, capsys):
    path = tmp_path / "own.yaml"
    files = f"train: {sst2}/train.jsonl, test: {sst2}/test.jsonl"
    text = f"task: own\ndataset_path: json\ndataset_kwargs: {{ data_files: {{ {files} }} }}{OWN}"
    assert not change or change[0] in text
    path.write_text(text.replace(*change) if change else text)
    words = ["evaluate", f"--task={path}", "--test-examples=2", "--device=cpu"]
    assert main(words) == (0 if message is None else 2)
    error = capsys.readouterr().err
    told = re.findall("zo-fused: .*", error)  # it may follow a bar of lm_eval's
    if message is not None:
        assert len(told) == 1
        assert message in told[0]
        assert "hf download" not in error


def test_masked_models_are_refused():
    tokenizer = roberta_tokenizer()
    size = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    config = tiny_models.config("roberta", **size)
    random = tiny_models.random_model(transformers.AutoModelForMaskedLM, config)
    with pytest.raises(UserError, match="lm_eval scores causal language models, and this is a ma"):
        Evaluator(random, tokenizer, 8)


def test_an_adapter_is_no_model(tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text("{}")
    words = ["--task=mezo_sst2", f"--test={SST2}", f"--model={tmp_path}"]
    assert main(["evaluate", *words]) == 2
    assert re.search(r"holds an adapter: give it as --adapter$", capsys.readouterr().err.strip())
