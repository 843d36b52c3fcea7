"""The papers' tasks, letter for letter, and tasks of lm_eval and of users, offline."""

import importlib
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
import yaml

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("needs lm_eval: `make test-tasks` installs it", allow_module_level=True)
transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from safetensors.torch import load_file  # noqa: E402

from zo_fused.cli.config import PRESETS, presets  # noqa: E402
from zo_fused.cli.defaults import EMBEDDED_MODEL  # noqa: E402
from zo_fused.cli.main import main  # noqa: E402
from zo_fused.task.encoding import Encoder  # noqa: E402
from zo_fused.task.errors import UserError  # noqa: E402
from zo_fused.task.generating import GenerationScorer  # noqa: E402
from zo_fused.task.lm_tasks import PAPERS, LmTask, _load, is_lm_task  # noqa: E402
from zo_fused.task.scoring import Scorer  # noqa: E402
from zo_fused.task.splits import Draw, shuffled  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

DATA = Path(__file__).parents[1] / "data" / "tasks"
YES = ("No", "Yes")
ONE, TWO = (0,), (1,)
ANA = "Ana Reis won the race in Lund. Per Holm came second.\n"
ANA += "- Reis led from the start\n- Holm was hurt\n-"
RECORD = [f" After the race {who} thanked her trainer" for who in ("Ana Reis", "Lund", "Per Holm")]
RECORD = (*RECORD, " After the race Reis thanked her trainer")
SKAGEN = "Title: Lighthouse\nContext: The lighthouse of Skagen was lit in 1858. It stands 46 "
SKAGEN += "metres tall.\nQuestion: When was the lighthouse of Skagen lit?\nAnswer:"
GRADES = tuple(f" {word}" for word in ("terrible", "bad", "okay", "good", "great"))
KINDS = ("Expression", "Entity", "Description", "Human", "Location", "Number")
NLI = (" Yes", " Maybe", " No")

# Task -> its file of records, and of some records (by number) the prompt, the candidates and the
# numbers of the right ones. Written from the templates of MeZO's code (large_models/templates.py,
# medium_models/run_fewshot.sh) and of the ZO benchmark's, not with ours. Where those split a text
# after a space, the space is the answer's here.
GOLDEN = {
    "mezo_sst2": ("glue_sst2", {
        0: ("a bright , patient film about bees It was", (" terrible", " great"), TWO),
        1: ("the second hour never ends It was", (" terrible", " great"), ONE),
    }),
    "mezo_rte": ("super_glue_rte", {
        0: ("The bridge at Ostra was closed on Monday after a crack was found.\nDoes this mean "
            'that "The bridge at Ostra has a crack." is true? Yes or No?\n', ("Yes", "No"), ONE),
        1: ('Lena paints boats.\nDoes this mean that "Lena sells boats." is true? Yes or No?\n',
            ("Yes", "No"), TWO),
    }),
    "mezo_cb": ("super_glue_cb", {
        0: ("Suppose A: Is it far? B: I don't think it is far. Can we infer that \"it is far\"? "
            "Yes, No, or Maybe?\n", ("Yes", "No", "Maybe"), TWO),
        2: ('Suppose Perhaps he left early. Can we infer that "he left early"? Yes, No, or '
            "Maybe?\n", ("Yes", "No", "Maybe"), (2,)),
    }),
    "mezo_boolq": ("super_glue_boolq", {
        0: ("Kestrel -- The kestrel is a small falcon that hovers. Is the kestrel a falcon?\n",
            YES, TWO),
        1: ("Owl -- Owls swallow small prey whole. Do owls have teeth?\n", YES, ONE),
    }),
    "mezo_wsc": ("super_glue_wsc.fixed", {
        0: ("Ida thanked Maud because She had found the key.\nIn the previous sentence, does the "
            'pronoun "she" refer to Ida? Yes or No?\n', YES, ONE),
    }),
    "mezo_wic": ("super_glue_wic", {
        1: ('Does the word "light" have the same meaning in these two sentences? Yes, No?\n'
            "Light fell on the page.\nThere was little light.\n", YES, TWO),
    }),
    "mezo_multirc": ("super_glue_multirc", {
        1: ("Nils took the ferry at nine. His dog stayed at home.\nQuestion: Who stayed at home?\n"
            'I found this answer "Nils". Is that correct? Yes or No?\n', YES, ONE),
    }),
    "mezo_copa": ("super_glue_copa", {
        0: ("The jar slipped from my hands so",
            (" it broke on the floor.", " I filled it with honey."), ONE),
        1: ("The bees left the hive because",
            (" the hive was empty.", " the queen had died."), TWO),
    }),
    "mezo_record": ("super_glue_record", {0: (ANA, RECORD, (3, 0))}),
    "mezo_squad": ("squad", {0: (SKAGEN, (" 1858\n",), ONE)}),
    "mezo_drop": ("drop", {
        0: ("Passage: The home side scored 3 goals before the break and 1 after it.\nQuestion: "
            "How many goals did the home side score?\nAnswer:", (" 4\n",), ONE),
        1: ("Passage: Moss and Dahl both scored.\nQuestion: Which players scored?\nAnswer:",
            (" Moss\n",), ONE),
    }),
    "mezo_winogrande": ("winogrande", {
        0: ("Mia lent Eva her coat because", (" Mia was cold.", " Eva was cold."), TWO),
        1: ("The nail bent before the board did, so",
            (" the nail was soft.", " the board was soft."), ONE),
    }),
    "mezo_roberta_sst2": ("glue_sst2", {
        # two spaces: the sentences of GLUE end in one, and LM-BFF's template starts with one
        3: ("nobody needed this  It was<mask>.", (" terrible", " great"), ONE),
    }),
    "mezo_roberta_sst5": ("sst5", {
        0: ("a bright , patient film about bees It was<mask>.", GRADES, (4,)),
    }),
    "mezo_roberta_snli": ("snli", {
        2: ("Two men carry a ladder?<mask>, nobody is there.", NLI, (2,)),
    }),
    "mezo_roberta_mnli": ("glue_mnli", {
        0: ("Two men carry a ladder?<mask>, some men carry a ladder.", NLI, ONE),
        1: ("Two men carry a ladder?<mask>, they paint a wall.", NLI, TWO),
    }),
    "mezo_roberta_rte": ("glue_rte", {
        1: ("Lena paints boats?<mask>, lena sells boats.", (" Yes", " No"), TWO),
    }),
    "mezo_roberta_trec": ("trec", {
        1: ("<mask>: Who built the lighthouse of Skagen ?", tuple(f" {k}" for k in KINDS), (3,)),
    }),
}  # fmt: skip


def local(name, source=None):
    source = str(DATA / f"{source or GOLDEN[name][0]}.jsonl")
    return LmTask(name, {"train": source, "test": source})


def in_order(task):
    """All of a task's records: its test set is drawn whole, then put in order."""
    examples = task.examples(Draw(dev=1))["test"]
    return sorted(examples, key=lambda example: int(example.source.rpartition(" ")[2]))


def test_every_task_has_golden_strings():
    assert {path.stem for path in PAPERS.glob("*.yaml")} == GOLDEN.keys()


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_strings(name):
    task = local(name)
    examples = in_order(task)
    for number, (prompt, answers, right) in GOLDEN[name][1].items():
        question = task.question(examples[number], mask="<mask>")
        assert question.prompts == (prompt,)
        assert question.answers == answers
        assert question.right == right
        assert task.answers in ((), answers)
    assert task.masked == ("roberta" in name)
    assert task.generates == (name in ("mezo_squad", "mezo_drop"))
    of_one_answer = {"mezo_copa", "mezo_record", "mezo_squad", "mezo_drop", "mezo_winogrande"}
    assert task.loss == ("lm" if name in of_one_answer else "classification")
    assert (task.answers == ()) == (name in of_one_answer)


@pytest.mark.parametrize("name", GOLDEN)
def test_data_sets_and_their_sets(name, monkeypatch):
    """Without files, lm_eval loads the data set that the docs name, by the names of its sets."""
    datasets = pytest.importorskip("datasets")
    eval_set = {"mezo_roberta_mnli": "validation_matched"}.get(name, "validation")
    eval_set = "test" if name in ("mezo_roberta_sst5", "mezo_roberta_trec") else eval_set
    lines = (DATA / f"{GOLDEN[name][0]}.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    calls = []

    def load_dataset(path, name, **options):
        calls.append((path, name, options))
        made = {"train": records, eval_set: records[::-1]}
        return {key: datasets.Dataset.from_list(rows) for key, rows in made.items()}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    _load.cache_clear()
    task = LmTask(name)
    _load.cache_clear()
    ((path, of, options),) = calls
    row = f"| `{name}` | {path}, {of} |" if of else f"| `{name}` | {path} |"
    assert row in (DATA.parents[2] / "docs" / "tasks.md").read_text()
    assert options == ({"revision": "refs/convert/parquet"} if "trec" in name else {})
    made = task.examples(Draw(dev=1))
    known = [record for record in records if record.get("label") != -1]
    assert [len(made[split]) for split in ("train", "dev", "test")] == [
        len(known) - 1,
        1,
        len(known),
    ]
    assert in_order(task)[0].fields == known[-1]  # of the set to evaluate on


# ---- what is trained on is what lm_eval scores ---------------------------------------------------


def evaluated(task, model, tokenizer):
    """lm_eval's results, and its samples in order."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(model, tokenizer=tokenizer, device="cpu")
    made = lm_eval.evaluate(lm, {task.name: task._task}, bootstrap_iters=0)
    samples = sorted(made["samples"][task.name], key=lambda sample: sample["doc_id"])
    return made["results"][task.name], samples


@torch.no_grad()
def test_lm_eval_scores_the_same_questions(model, tokenizer):
    """The same prompts and candidates, and the same log-likelihoods but for the order of sums."""
    task = local("mezo_sst2")
    results, samples = evaluated(task, model, tokenizer)
    examples = in_order(task)
    for sample, example in zip(samples, examples, strict=True):
        question = task.question(example)
        assert sample["arguments"] == [(question.prompts[0], answer) for answer in question.answers]
        assert question.right == (sample["target"],)
    encoder = Encoder(task, tokenizer, 128)
    scorer = Scorer(model, encoder.answers, pad_id=0)
    assert scorer.shared  # of one token each, so that a mean is a sum
    encoded = encoder.encode(examples)
    want = torch.tensor([[score for ((score, _),) in sample["resps"]] for sample in samples])
    torch.testing.assert_close(scorer.scores(scorer.batch(encoded)), want, rtol=0, atol=2e-5)
    assert results["acc,none"] == scorer.evaluate(encoded, 3).accuracy


@torch.no_grad()
def test_lm_eval_generates_the_same_answers(model, tokenizer):
    task = local("mezo_squad")
    results, samples = evaluated(task, model, tokenizer)
    encoded = Encoder(task, tokenizer, 256).encode(in_order(task))
    scorer = GenerationScorer(model, tokenizer, 1, task.stops, task.max_new_tokens)
    assert (task.stops, task.max_new_tokens) == (("\n",), 50)
    written = scorer.write([example.prompt for example in encoded])
    assert written == [sample["resps"][0][0].strip() for sample in samples]
    assert all(written)
    quality = scorer.evaluate(encoded, 2)
    assert (results["f1,none"], results["exact_match,none"]) == (quality.f1, quality.accuracy)


def test_lm_eval_finds_the_tasks():
    """With its option --include_path, by name and by tag."""
    manager = importlib.import_module("lm_eval.tasks").TaskManager
    manager = manager(include_path=str(PAPERS), include_defaults=False)
    assert set(manager.all_subtasks) == GOLDEN.keys()
    assert manager.all_tags == ["mezo"]


# ---- tasks of users and of lm_eval ---------------------------------------------------------------

OWN = """\
task: own
dataset_path: json
dataset_kwargs: { data_files: { train: "%s", valid: "%s" } }
training_split: train
validation_split: valid
output_type: multiple_choice
description: "Which?\\n"
doc_to_text: !function own.text
doc_to_choice: !function own.choices
doc_to_target: answer
"""
FUNCTIONS = """\
def text(doc):
    return int(doc["answer"]) - 1

def choices(doc):
    before, _, _ = doc["sentence"].partition("_")
    return [before + doc["option1"], before + doc["option2"]]
"""


def test_a_users_file(tmp_path):
    """With functions beside it, its own data, and prompts that differ (as lm_eval's WinoGrande)."""
    data = DATA / "winogrande.jsonl"
    (tmp_path / "own.py").write_text(FUNCTIONS)
    (tmp_path / "own.yaml").write_text(OWN % (data, data) + "doc_to_target: ' was cold.'\n")
    task = LmTask(str(tmp_path / "own.yaml"))
    assert (task.name, task.answers, task.loss) == ("own", (), "classification")
    question = task.question(in_order(task)[0])
    prompts = [f"Which?\nMia lent Eva her coat because {who}" for who in ("Mia", "Eva")]
    assert question.prompts == tuple(prompts)
    assert question.answers == ("  was cold.",) * 2  # after lm_eval's delimiter, a space
    assert question.right == (1,)
    examples = task.examples(Draw(1, 1, 2, seed=5))
    assert {split: len(made) for split, made in examples.items()} == {
        "train": 1,
        "dev": 1,
        "test": 2,
    }


def test_the_file_of_the_docs(tmp_path, monkeypatch):
    text = (DATA.parents[2] / "docs" / "tasks.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(block)
    record = {"title": "Kettle", "text": "It leaks.", "stars": 0}
    for name in ("reviews.jsonl", "reviews-held-out.jsonl"):
        Path(name).write_text(json.dumps(record) + "\n" + json.dumps(record | {"stars": 2}))
    task = LmTask("mine.yaml")
    question = task.question(in_order(task)[1])
    assert question.prompts == ("Kettle\nIt leaks.\nThe buyer was",)
    assert question.answers == task.answers == (" angry", " content", " happy")
    assert question.right == (2,)


def test_a_task_of_lm_eval():
    """Its SST-2 has other words than MeZO's."""
    question = local("sst2", "glue_sst2").question(in_order(local("sst2", "glue_sst2"))[1])
    assert question.prompts[0].startswith("the second hour never ends")
    assert question.answers == (" negative", " positive")
    assert question.right == (0,)
    with pytest.raises(UserError, match="glue is a group of tasks of lm_eval"):
        LmTask("glue")
    with pytest.raises(UserError, match=r"no task 'mezo_sst', neither .*did you mean mezo_sst2"):
        LmTask("mezo_sst")


def test_names_and_files_are_told_apart(tmp_path):
    (tmp_path / "task").touch()
    (tmp_path / "sst2").mkdir()  # with its data, perhaps
    assert is_lm_task("mezo_sst2")
    assert is_lm_task(str(tmp_path / "sst2"))
    assert is_lm_task("nowhere.yaml")
    assert not is_lm_task("nowhere.json")
    assert not is_lm_task(str(tmp_path / "task"))


def test_a_file_without_examples_is_told(tmp_path):
    (tmp_path / "none.jsonl").touch()
    with pytest.raises(UserError, match=r"none\.jsonl holds no examples"):
        LmTask("mezo_sst2", {"train": str(tmp_path / "none.jsonl")})


BAD = {
    "task: x\ndoc_to_text: [": "can't read the task file",
    "group: x\ntask: [sst2]": "is of a group of tasks, not of one",
    "include: mezo_sst2.yaml\nmetadata: { loss: f1 }": "has 'f1' for loss in its metadata",
    "include: mezo_sst2.yaml\nmetadata: { dev_examples: few }": "has 'few' for dev_examples in",
    "include: mezo_squad.yaml\nmetadata: { loss: classification }": "has 'classification' for los",
    "task: x\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: text":
        "is of the type loglikelihood_rolling, which has no answers to train on",
    "task: x\noutput_type: multiple_choice\ndoc_to_text: '{{text}} <mask>'\n"
    "doc_to_choice: '{{[text, text_2 ~ text]}}'\ndoc_to_target: 0": "can't use .*'text_2' is und",
    "task: x\noutput_type: multiple_choice\ndoc_to_text: '{{text}} <mask>'\n"
    "doc_to_choice: '{{[text, text]}}'\ndoc_to_target: 0": "has a <mask>, but not the same answ",
}  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_a_bad_file_is_told(text, tmp_path):
    path, data = tmp_path / "x.yaml", tmp_path / "data.jsonl"
    path.write_text(text.replace("include: ", f"include: {PAPERS}/"))
    record = {"text": "a", "sentence": "b", "label": 0, "title": "", "context": "", "question": ""}
    data.write_text(json.dumps(record | {"answers": {"text": ["c"]}}) + "\n")
    with pytest.raises(UserError, match=BAD[text]):
        LmTask(str(path), {"train": str(data)})
    with pytest.raises(UserError, match=r"there is no task file .*none\.yaml"):
        LmTask(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "mezo_sst2",
            {"sentence": None},
            "can't read this record: 'None' has no attribute 'strip'",
        ),
        ("mezo_sst2", {"label": 2}, "its answer 2 is none of the 2 candidates"),
        ("mezo_copa", {"question": "why"}, "the question of COPA is effect or cause, not 'why'"),
        ("mezo_record", {"answers": ["Oslo"]}, "none of the answers is an entity of the passage"),
        ("mezo_squad", {"answers": {"text": [], "answer_start": []}}, "it has no right answer"),
        ("mezo_roberta_sst2", {"sentence": "a <mask>"}, "the text holds '<mask>', the mask token"),
    ],
)
def test_a_bad_record_is_told_with_its_row(name, change, message, tmp_path):
    lines = (DATA / f"{GOLDEN[name][0]}.jsonl").read_text().splitlines()
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join([lines[0], json.dumps(json.loads(lines[1]) | change)]))
    task = LmTask(name, {"train": str(path), "test": str(path)})
    with pytest.raises(UserError) as error:
        [task.question(example, "[MASK]") for example in in_order(task)]
    assert f"{name} test row 2: " in str(error.value) or f"{name} train row 2: " in str(error.value)
    assert message in str(error.value)


def test_answers_out_of_a_table_are_numbers(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text('sentence,label\n"a film",1\n"no film",0\n')
    task = LmTask("mezo_sst2", {"train": str(tmp_path), "test": str(path)})
    assert [task.question(example).right for example in in_order(task)] == [(1,), (0,)]


# ---- the command line ----------------------------------------------------------------------------


def arguments(name, output, *more):
    file = str(DATA / f"{GOLDEN[name][0]}.jsonl")
    words = ["finetune", "--task", name, "--output", str(output), "--device", "cpu", "--steps", "2"]
    words += ["--batch-size", "2", "--eval-steps", "2", "--seed", "3"]
    return [*words, *(f"--{split}={file}" for split in ("train", "dev", "test")), *more]


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("mezo_rte", ("--method=mezo", "--schedule=deferred")),
        ("mezo_copa", ("--method=lozo",)),
        ("mezo_copa", ("--method=lozo", "--schedule=paired", "--loss=classification")),
        ("mezo_record", ("--loss=classification", "--peft=lora", "--method=mezo")),
        ("mezo_squad", ()),
        ("mezo_drop", ("--method=es", "--population=2", "--loss=f1", "--schedule=plain")),
        ("mezo_cb", ("--k=1", "--method=mezo")),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
@pytest.mark.filterwarnings("ignore")
def test_a_run(name, more, tmp_path, capsys):
    """On the embedded model: what was drawn is trained on and evaluated, and replays."""
    assert main(arguments(name, tmp_path / "out", *more)) == 0
    out = capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    given = [word.partition("=")[2] for word in more if word.startswith("--loss")]
    of_one_answer = name in ("mezo_copa", "mezo_squad")
    assert (
        summary["settings"]["loss"] == (given or ["lm" if of_one_answer else "classification"])[0]
    )
    assert ("test F1" in out) == ("test F1 " in out) == (name in ("mezo_squad", "mezo_drop"))
    assert summary["accuracy"].keys() == {"dev", "test"}
    assert summary["task"] == name
    assert summary["draw"]["k"] == (1 if "--k=1" in more else None)
    assert summary["draw"]["test"] == 1000
    log, model = tmp_path / "out" / "replay.jsonl", ["--model", str(EMBEDDED_MODEL)]
    adapter = ["--peft", "lora"] if "--peft=lora" in more else []
    words = ["replay", *model, "--log", str(log), *adapter, "--verify", str(tmp_path / "out")]
    assert main(words) == 0
    assert "equal: all" in capsys.readouterr().out


def test_a_run_is_resumed_with_the_same_examples(tmp_path, monkeypatch, capsys):
    """The draw is made anew, from the same seed; another one is refused."""
    more = ("--train-examples=1", "--steps=4", "--method=mezo", "--data-seed=5")
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main(arguments("mezo_record", whole, *more)) == 0
    with monkeypatch.context() as patch:
        original, calls = Scorer.loss, []

        def loss(scorer, batch, kind="classification"):
            calls.append(0)
            if len(calls) == 7:
                raise KeyboardInterrupt
            return original(scorer, batch, kind)

        patch.setattr(Scorer, "loss", loss)
        assert main(arguments("mezo_record", out, *more)) == 130
    other = arguments("mezo_record", out, *more[:-1], "--data-seed=0", "--resume")
    assert shuffled(2, 5)[0] != shuffled(2, 0)[0]
    assert main(other) == 2
    assert "the run was started with training data" in capsys.readouterr().err
    assert main(arguments("mezo_record", out, *more, "--resume")) == 0
    tuned, resumed = (load_file(folder / "model.safetensors") for folder in (whole, out))
    assert all(torch.equal(tuned[name], resumed[name]) for name in tuned)


@pytest.mark.parametrize("name", presets())
@pytest.mark.filterwarnings("ignore")
def test_a_preset_runs(name, masked_model, tmp_path):
    """With small models, two steps and few examples, and what it says of the rest."""
    said = yaml.safe_load((PRESETS / f"{name}.yaml").read_text())
    base = masked_model if "roberta" in name else EMBEDDED_MODEL
    words = arguments(said["task"], tmp_path / "out", f"--model={base}", f"--preset={name}")
    words += ["--k=1"] if "k" in said else ["--train-examples=1", "--dev-examples=1"]
    assert main(words) == 0
    settings = json.loads((tmp_path / "out" / "summary.json").read_text())["settings"]
    compared = said.keys() & {"method", "lr", "eps", "rank", "interval", "loss", "peft", "dtype"}
    assert {"method", "lr", "eps"} <= compared
    for option in compared:
        wanted = float(said[option]) if option in ("lr", "eps") else said[option]
        assert settings[option] == wanted, option


def test_a_run_of_a_masked_model(masked_model, tmp_path, capsys):
    base = masked_model
    masked = arguments("mezo_roberta_sst2", tmp_path / "out", f"--model={base}", "--method=mezo")
    assert main(masked) == 0
    assert main([*masked[:2], "mezo_sst2", *masked[3:], "--overwrite"]) == 2
    error = capsys.readouterr().err
    assert (
        "is a masked language model (roberta), and the prompts of the task mezo_sst2 hav" in error
    )
    assert main(arguments("mezo_roberta_sst2", tmp_path / "out", "--overwrite")) == 2
    assert (
        "is a causal language model (opt), and the prompts of the task" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("mezo_squad", ("--loss=classification",), "has no candidates for --loss classification"),
        (
            "mezo_sst2",
            ("--template={a}", "--verbalizer", "0=a"),
            "--task and --template exclude each other",
        ),
        ("mezo_sst2", ("--no-template",), "--no-template is for a task given by template and"),
        ("mezo_sst2", ("--label-field=x",), "--label-field is for a task given by template and v"),
        ("mezo_sst2", ("--k=1", "--dev-examples=1"), "--k excludes --train-examples and --dev-ex"),
        (
            "mezo_copa",
            ("--k=1",),
            "--k needs classes, and the answers of the task mezo_copa differ",
        ),
        ("mezo_sst2", ("--data-seed=-1",), "must be a whole number below 2**32, got '-1'"),
    ],
)
def test_mistakes_are_told_in_one_sentence(name, more, message, tmp_path, capsys):
    assert main(arguments(name, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_without_a_network_it_is_told_what_to_fetch(tmp_path, capsys):
    assert main(["finetune", "--task", "mezo_sst2", "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "can't load the task mezo_sst2 and its data set 'nyu-mll/glue' (" in error
    assert "with `hf download nyu-mll/glue --repo-type dataset` and give its files with" in error
    assert error.count("\n") == 1
