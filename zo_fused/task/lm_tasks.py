"""Tasks in the YAML format of lm_eval: those in `papers/`, lm_eval's own, and a user's.

lm_eval loads the file and the data set, and makes a record's prompt, candidates and right answer:
what is trained on here is what ``lm_eval`` scores, letter for letter.
"""

from __future__ import annotations

import difflib
import functools
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zo_fused.task.data import SPLITS, Example, read_records
from zo_fused.task.errors import UserError, first_line, optional
from zo_fused.task.prompt import Question
from zo_fused.task.splits import Draw, drawn, shuffled

PAPERS = Path(__file__).parent / "papers"
MASK = "<mask>"  # in a prompt: where the answer of a masked language model belongs
INSTALL = "zo-fused[tasks]"
# MeZO's, of a data set that is large enough; a task's metadata may say otherwise.
TRAIN, DEV, TEST = 1000, 500, 1000


def is_lm_task(name: str) -> bool:
    """Whether ``--task`` names such a task, and no JSON file with template and verbalizer."""
    return _is_yaml(name) or not (Path(name).suffix.lower() == ".json" or Path(name).is_file())


def _is_yaml(name: str | Path) -> bool:
    return Path(name).suffix.lower() in (".yaml", ".yml")


class LmTask:
    """A task of lm_eval: multiple choice, or an answer to generate.

    Args:
        name: of a file in `papers/`, of a task of lm_eval, or the path of a YAML file.
        files: split -> a file of records as `read_records` takes it, in place of the task's data
            set, and in its schema.

    Attributes:
        masked: whether the prompts have a `MASK`.
        answers: the candidates, where all records have the same; else ().
        generates: whether there are no candidates, and the model is to write the answer.
        stops: texts that end a generated answer.
        max_new_tokens: of a generated answer; 0 where none is.
        loss: what the paper trains with: "classification" or "lm".
        dev_examples: how many to draw unless the user says otherwise.

    Raises:
        UserError: there is no such task, it can't be loaded, or it asks for something else.
    """

    def __init__(self, name: str, files: Mapping[str, str] | None = None) -> None:
        self.name = Path(name).stem if _is_yaml(name) else name
        self.files = dict(files or {})
        self._task = _load(name, tuple(sorted(self.files.items())))
        config = self._task.config
        if config.output_type not in ("multiple_choice", "generate_until"):
            raise UserError(
                f"the task {name} is of the type {config.output_type}, which has no answers to "
                "train on; take one of the type multiple_choice or generate_until"
            )
        self.generates = config.output_type == "generate_until"
        self.masked = isinstance(config.doc_to_text, str) and MASK in config.doc_to_text
        choices = config.doc_to_choice
        choices = list(choices.values()) if isinstance(choices, dict) else choices
        fixed = isinstance(choices, list) and not self.generates and not self._task.multiple_input
        delimiter = config.target_delimiter
        self.answers = tuple(f"{delimiter}{choice}" for choice in choices) if fixed else ()
        if self.masked and not self.answers:
            raise UserError(f"the task {name} has a {MASK}, but not the same answers for all")
        losses = ("lm",) if self.generates else ("classification", "lm")
        self.loss = self._metadata("loss", losses[0], losses.__contains__)
        self.dev_examples = self._metadata("dev_examples", DEV, _is_count)
        wanted = (config.generation_kwargs or {}) if self.generates else {}
        until = wanted.get("until", [])
        self.stops = tuple([until] if isinstance(until, str) else until)
        # without a limit of its own, lm_eval's
        self.max_new_tokens = int(wanted.get("max_gen_toks", 256)) if self.generates else 0

    def _metadata(self, key: str, default: Any, right: Callable[[Any], bool]) -> Any:
        value = (self._task.config.metadata or {}).get(key, default)
        if not right(value):
            raise UserError(f"the task {self.name} has {value!r} for {key} in its metadata")
        return value

    def question(self, example: Example, mask: str = "") -> Question:
        """What `examples` made of the record, with `mask` in the place of `MASK`.

        Raises:
            UserError: there is not one `MASK` in it.
        """
        question = example.question
        if question is None:
            raise ValueError("an example of LmTask comes from `LmTask.examples`")
        if not self.masked:
            return question
        (prompt,) = question.prompts
        if prompt.count(MASK) != 1:
            raise UserError(f"{example.source}: the text holds {MASK!r}, the mask token itself")
        prompts = (prompt.replace(MASK, mask),)
        return Question(prompts, question.answers, question.right)

    def draw(self, given: Draw) -> Draw:
        """How many examples to draw, with MeZO's numbers where none are given."""
        if given.k is not None:
            return Draw(None, None, given.test or TEST, given.k, given.seed)
        dev = given.dev or self.dev_examples
        return Draw(given.train or TRAIN, dev, given.test or TEST, None, given.seed)

    def examples(self, given: Draw) -> dict[str, list[Example]]:
        """The examples of each split that there is, drawn as `given` says.

        Raises:
            UserError: the task has no training set, no classes for a k-shot draw, or a record that
                it can't read.
        """
        sets = self._sets()
        if "train" not in sets:
            raise UserError(f"the task {self.name} has no training set; give one with --train")
        if given.k is not None and not self.answers:
            raise UserError(f"--k needs classes, and the answers of the task {self.name} differ")
        sizes = {split: len(docs) for split, docs in sets.items()}
        with quiet():
            label_of = self._labels(sets["train"]) if given.k is not None else lambda i: None
            places = drawn(sizes, self.draw(given), label_of)
            return {
                split: [self._example(f"{self.name} {of}", sets[of], i) for of, i in chosen]
                for split, chosen in places.items()
            }

    def for_lm_eval(self, given: Draw) -> tuple[Any, list[int], Sequence[Mapping[str, Any]]]:
        """The task as lm_eval evaluates it, the numbers in its `eval_docs` of the test examples
        that `examples` would draw, in that order, and the training set, () where there is none.

        Raises:
            UserError: there is no test set, or a record that lm_eval could not judge.
        """
        sets = self._sets()
        if "test" not in sets:
            raise UserError(f"the task {self.name} needs --test with its --train")
        test = shuffled(len(sets["test"]), given.seed)[: self.draw(given).test]
        with quiet():
            for i in test:
                self._check_target(self._example(f"{self.name} test", sets["test"], i))
        return self._task, test, sets.get("train", ())

    def _check_target(self, example: Example) -> None:
        """Refuses an answer that we understand, and that lm_eval would hold for wrong."""
        question, target = example.question, self._task.doc_to_target(example.fields)
        if self.generates or self._task.multiple_input or question is None:
            return
        if isinstance(target, str) and target not in self._task.doc_to_choice(example.fields):
            raise UserError(
                f"{example.source}: its answer {target!r} is a text, as it is in tables, and "
                "lm_eval wants the number; give the records as JSON lines or Parquet"
            )

    def _sets(self) -> dict[str, Any]:
        """The task's sets: test is what lm_eval evaluates on; dev is there in `files` alone."""
        task, sets = self._task, {}
        with quiet():
            if task.has_training_docs():
                sets["train"] = task.training_docs()
            if self.files:
                if "dev" in self.files:
                    sets["dev"] = task.validation_docs()
                if "test" in self.files:
                    sets["test"] = task.test_docs()
            else:
                sets["test"] = task.eval_docs
        return sets

    def _labels(self, docs: Any) -> Callable[[int], Any]:
        """The class of each record, without rendering it where it is a column."""
        target = self._task.config.doc_to_target
        if isinstance(target, str) and target in docs.column_names:
            return list(docs[target]).__getitem__
        return lambda i: self._task.doc_to_target(docs[i])

    def _example(self, where: str, docs: Any, index: int) -> Example:
        doc, where = docs[index], f"{where} row {index + 1}"
        try:
            question = self._ask(doc)
        except Exception as error:  # of Jinja, or of a function of the task
            raise UserError(
                f"{where}: the task {self.name} can't read this record: {first_line(error)}"
            ) from error
        return Example(doc, str(question.right[0]), where, question)

    def _ask(self, doc: Mapping[str, Any]) -> Question:
        """The requests that lm_eval makes of a record, and which of them is right.

        Raises:
            ValueError: none is. And whatever the task raises.
        """
        task = self._task
        context = task.fewshot_context(doc, 0, gen_prefix=task.doc_to_prefix(doc))
        target = task.doc_to_target(doc)
        if self.generates:
            texts = tuple(map(str, target)) if isinstance(target, list) else (str(target),)
            if not texts:
                raise ValueError("it has no right answer")
            end = self.stops[0] if self.stops else ""
            answer = f"{task.config.target_delimiter}{texts[0]}{end}"
            return Question((context,), (answer,), (0,), texts)
        choices = task.doc_to_choice(doc)
        if len(choices) < 2:
            raise ValueError(f"it has {len(choices)} candidates")
        # further requests are of the candidates alone, for a metric
        requests = task.construct_requests(doc, context)[: len(choices)]
        prompts, answers = zip(*(request.arguments for request in requests), strict=True)
        if len(set(prompts)) == 1:
            prompts = prompts[:1]
        right = task.doc_to_text(doc) if task.multiple_input else target
        return Question(prompts, answers, _right(right, choices))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def _right(target: Any, choices: list[str]) -> tuple[int, ...]:
    """The indices of the right candidates, as lm_eval reads what ``doc_to_target`` says.

    Raises:
        ValueError: one is not there.
    """
    found = []
    for one in target if isinstance(target, list) else [target]:
        index = choices.index(one) if isinstance(one, str) and one in choices else one
        if isinstance(index, str) and index.isdecimal():  # out of a table
            index = int(index)
        if not isinstance(index, int) or not 0 <= index < len(choices):
            raise ValueError(f"its answer {one!r} is none of the {len(choices)} candidates")
        found.append(int(index))
    if not found:
        raise ValueError("it has no right answer")
    return tuple(found)


@contextmanager
def quiet() -> Iterator[None]:
    """Without what lm_eval warns of in tasks of its own, and the progress bars of datasets."""
    logger, datasets = logging.getLogger("lm_eval"), optional("datasets")
    level, bars = logger.level, datasets.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


@functools.lru_cache(maxsize=2)  # a comparison asks for the same task for every run
def _load(name: str, files: tuple[tuple[str, str], ...]) -> Any:
    """lm_eval's object of a task, with its data."""
    manager_of = optional("lm_eval.tasks", INSTALL).TaskManager
    path = PAPERS / f"{name}.yaml" if (PAPERS / f"{name}.yaml").is_file() else Path(name)
    key, from_file = name, _is_yaml(path)
    if from_file and not path.is_file():
        raise UserError(f"there is no task file {name}")
    with quiet(), tempfile.TemporaryDirectory() as folder:
        if from_file:
            # a folder with this task alone: lm_eval reads all files of a folder
            key = path.stem
            text = f"include: {json.dumps(str(path.resolve()))}\ntask: {json.dumps(key)}\n"
            (Path(folder) / "task.yaml").write_text(text, encoding="utf-8")
            manager = manager_of(include_path=folder, include_defaults=False)
        else:
            manager = _tasks_of_lm_eval()
        if key not in manager.all_subtasks:
            raise _unknown(name, path if from_file else None, manager)
        overrides: dict[str, Any] = {"fewshot_split": None, "fewshot_config": {"samples": []}}
        if files:
            overrides |= _with_files(dict(files))
        # a group of one, as only groups take overrides
        group = {"group": "zo_fused", "task": [{"task": key, **overrides}]}
        try:
            (task,) = manager.load([group])["tasks"].values()
        except UserError:
            raise
        except Exception as error:  # of YAML, Jinja, datasets or the task's own code
            source = (manager.task_index[key].cfg or {}).get("dataset_path")
            raise _unloadable(name, files, source, error) from error
    return task


@functools.lru_cache(maxsize=1)
def _tasks_of_lm_eval() -> Any:
    """All of them; to find them takes seconds."""
    return optional("lm_eval.tasks", INSTALL).TaskManager()


def _unknown(name: str, path: Path | None, manager: Any) -> UserError:
    if path is not None and manager.all_tasks:
        return UserError(f"the task file {name} is of a group of tasks, not of one")
    if path is not None:
        try:
            manager.load([str(path)])
        except Exception as error:
            return UserError(f"can't read the task file {name}: {first_line(error)}")
    if name in manager.all_tasks:
        return UserError(f"{name} is a group of tasks of lm_eval; take one of them")
    own = [path.stem for path in PAPERS.glob("*.yaml")]
    close = difflib.get_close_matches(name, [*own, *manager.all_subtasks], n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "`lm-eval ls tasks` lists lm_eval's"
    return UserError(f"there is no task {name!r}, neither of a paper nor of lm_eval ({hint})")


def _unloadable(name: str, files: Any, source: Any, error: Exception) -> UserError:
    kind = type(error).__name__
    why = f"{kind}: {first_line(error)}" if str(error).strip() else kind
    if files:
        given = ", ".join(dict.fromkeys(path for _, path in files))
        return UserError(f"the task {name} can't use {given}: {why}")
    if source is None:
        return UserError(f"can't load the task {name} ({why})")
    if "/" not in f"{source}" or Path(source).exists():  # not of the Hub
        return UserError(f"can't load the task {name} and its data {source!r} ({why})")
    return UserError(
        f"can't load the task {name} and its data set {source!r} ({why}); without a network, fetch "
        f"it elsewhere with `hf download {source} --repo-type dataset` and give its files with "
        "--train and --test"
    )


def _with_files(files: Mapping[str, str]) -> dict[str, Any]:
    """What makes lm_eval take local records instead of the task's data set."""
    datasets = optional("datasets")
    made = {
        split: datasets.Dataset.from_list([record for _, record in read_records(source, split)])
        for split, source in files.items()
    }
    others = {split: made["train"] for split in SPLITS if split not in made}
    return {
        "custom_dataset": lambda **_: made | others,
        "dataset_kwargs": None,
        "training_split": "train",
        "validation_split": "dev" if "dev" in files else None,
        "test_split": "test",  # lm_eval wants one
    }
