"""Every `zo-fused` command of README and docs runs, on small models and data in the place of what
they name, and for a few steps. The commands of a block run one after the other."""

import importlib
import importlib.util
import json
import shutil
from pathlib import Path

import pytest

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("needs lm_eval: `make test-tasks` installs it", allow_module_level=True)
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from support.docs import DOCS, PAGES, ROOT, blocks, commands_of

from zo_fused.cli.defaults import EMBEDDED_DATA, EMBEDDED_MODEL
from zo_fused.cli.main import main
from zo_fused.task.scoring import Scorer

pytestmark = pytest.mark.filterwarnings("ignore")  # of lm_eval and what it imports

RECORDS = ROOT / "tests" / "data" / "tasks"
HELLASWAG = {
    "activity_label": "Baking",
    "ctx_a": "A boy mixes flour and milk.",
    "ctx_b": "he",
    "endings": ["pours it into a tin.", "reads it.", "paints it.", "sings it."],
    "label": "0",
}
FEW = {  # options after which a command is done in a moment
    "finetune": "--steps 2 --batch-size 2 --train-examples 4 --dev-examples 2 --test-examples 2",
    "compare": "--forwards 4 --batch-size 2 --train-examples 4 --dev-examples 2 --test-examples 2",
    "evaluate": "--test-examples 2",
    "plan": "--method lozo",
}


def of_pages():
    """The commands of every block; those of an earlier one are left out."""
    seen = set()
    for page in PAGES:
        for i, block in enumerate(blocks(page, "sh", "console")):
            if new := [words for words in commands_of(block) if tuple(words) not in seen]:
                seen |= {tuple(words) for words in new}
                yield pytest.param(new, id=f"{page.name}-{i}")


BLOCKS = list(of_pages())


def write(path, records):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The present folder, with the files that the docs tell of; the checkout is beside them."""
    monkeypatch.chdir(tmp_path)
    for name in ("zo_fused", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    lines = (EMBEDDED_DATA / "train.jsonl").read_text().splitlines()[:8]
    named = [json.loads(line) for line in lines]
    numbers = [{**record, "label": int(record["label"] == "positive")} for record in named]
    stars = [{"title": "Kettle", "text": "It leaks.", "stars": n % 3} for n in range(8)]
    for split in ("train", "dev", "test"):
        write(tmp_path / f"{split}.jsonl", named)
        write(tmp_path / "DIR" / f"{split}.jsonl", numbers)
        write(tmp_path / "mine" / f"{split}.jsonl", named)
    shutil.copy(EMBEDDED_DATA / "task.json", tmp_path / "mine")
    for name in ("reviews", "reviews-held-out"):
        write(tmp_path / f"{name}.jsonl", stars)
    [task] = blocks(DOCS / "tasks.md", "yaml")
    Path("mine.yaml").write_text(task)
    return tmp_path


@pytest.fixture(autouse=True)
def hub(monkeypatch):
    """Data sets of the Hub: forty records in the same schema."""
    datasets = importlib.import_module("datasets")
    original = datasets.load_dataset

    def load(path, name=None, **options):
        if "/" not in path:  # json: files of the user
            return original(path, name, **options)
        file = RECORDS / f"{'_'.join([path.split('/')[1], *([name] if name else [])])}.jsonl"
        records = [HELLASWAG]
        if "hellaswag" not in path:
            records = [json.loads(line) for line in file.read_text().splitlines()]
        many = datasets.Dataset.from_list((records * 40)[:40])
        return datasets.DatasetDict(train=many, validation=many, test=many)

    monkeypatch.setattr(datasets, "load_dataset", load)


def stand_in(words, masked_model):
    """The command with small models, few examples and few steps."""
    words = [*words, *FEW.get(words[0], "").split()]
    if "--k" in words:
        del words[words.index("--train-examples") :]
        words += ["--k", "1"]
    for name in ("--model", "--adapter"):
        value = words[words.index(name) + 1] if name in words else ""
        if value.startswith("runs/") and not Path(value).exists():  # of another page
            made_before(Path(value), adapter=name == "--adapter")
        elif "/" in value and not Path(value).exists():
            words[words.index(name) + 1] = str(EMBEDDED_MODEL)
        elif value == "roberta-large":
            words[words.index(name) + 1] = str(masked_model)
    if "--preset" in words and words[0] == "finetune":
        words += ["--model", str(EMBEDDED_MODEL)]
    return words


def made_before(path, adapter):
    """A tuned model, or an adapter of one."""
    if not adapter:
        shutil.copytree(EMBEDDED_MODEL, path)
        return
    words = f"finetune --peft lora --method mezo --output {path} {FEW['finetune']}"
    assert main(words.split()) == 0


def interrupted(words):
    """A run that Ctrl-C has stopped, for a command that goes on with it."""
    original, calls = Scorer.loss, []

    def loss(scorer, *given, **more):
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(scorer, *given, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scorer, "loss", loss)
        assert main([word for word in words if word != "--resume"]) == 130


@pytest.mark.parametrize("commands", BLOCKS)
def test_the_commands_run(commands, folder, masked_model, capsys):
    for number, command in enumerate(commands):
        words = stand_in(command, masked_model)
        if words[0] == "finetune" and "--output" not in words:  # alternatives have one default
            words += ["--output", f"run-{number}"]
        if "--resume" in words:
            interrupted(words)
        assert main(words) == 0, (words, capsys.readouterr().err)


def test_there_are_commands():
    assert len(BLOCKS) > 10
