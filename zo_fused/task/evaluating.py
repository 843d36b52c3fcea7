"""Evaluation by lm_eval, which makes the prompts, scores the answers and counts: of a model as it
is, tuned or not, with demonstrations in the prompt or without, calibrated or not."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from zo_fused.task.adapters import base_model
from zo_fused.task.data import Example, read_examples
from zo_fused.task.encoding import maximum_length
from zo_fused.task.errors import UserError, first_line, optional
from zo_fused.task.lm_tasks import INSTALL, LmTask, quiet
from zo_fused.task.models import fills_masks
from zo_fused.task.prompt import Task
from zo_fused.task.splits import Draw, shuffled

CALIBRATED = "acc_mutual_info"  # lm_eval's name
_SETS = 10_000  # of MeZO's run.py: the seeds of demonstrations are below

Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Subject:
    """What a model is evaluated on."""

    name: str
    task: Any  # lm_eval's
    test: Sequence[int]  # numbers in its `eval_docs`, in the order in which they were drawn
    train: Records  # what demonstrations are drawn from


def of_lm_task(task: LmTask, draw: Draw) -> Subject:
    """A task of lm_eval, on the test examples that finetune draws.

    Raises:
        UserError: see `LmTask.for_lm_eval`, or it is a task for masked language models.
    """
    if task.masked:
        raise UserError(f"the prompts of {task.name} have a mask, which lm_eval can't fill in")
    return Subject(task.name, *task.for_lm_eval(draw))


def of_template(
    name: str, task: Task, sources: Mapping[str, str], draw: Draw, label_field: str = "label"
) -> Subject:
    """A task of template and verbalizer, in lm_eval's format, on the same examples.

    Args:
        sources: where to read "test", and "train" for demonstrations.

    Raises:
        UserError: see `read_examples`, or it is a task for masked language models.
    """
    if task.masked:
        raise UserError(f"the template of {name} has a mask, which lm_eval can't fill in")
    datasets = optional("datasets")
    made = {
        split: datasets.Dataset.from_list(
            [_record(task, e) for e in read_examples(source, task, split, label_field)]
        )
        for split, source in sources.items()
    }
    config = {
        "task": name,
        "custom_dataset": lambda **_: made,
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "prompt",
        "doc_to_choice": list(task.answers),
        "doc_to_target": "right",
        "target_delimiter": "",
        "fewshot_config": {"samples": []},
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    with quiet():
        ours = optional("lm_eval.api.task", INSTALL).ConfigurableTask(config=config)
    size = len(made["test"])
    test = list(range(size)) if draw.test is None else shuffled(size, draw.seed)[: draw.test]
    return Subject(name, ours, test, made.get("train", ()))


def _record(task: Task, example: Example) -> dict[str, Any]:
    question = task.question(example)
    return {"prompt": question.prompts[0], "right": question.right[0]}


class Evaluator:
    """A causal language model in lm_eval's hands.

    Args:
        model: of transformers or peft, in eval mode.
        batch_size: rows of a forward pass.

    Raises:
        UserError: the model is a masked one.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int) -> None:
        if fills_masks(base_model(model).config):
            raise UserError(
                "lm_eval scores causal language models, and this is a masked one; finetune "
                "evaluates those, before and after"
            )
        self.max_length = maximum_length(model, tokenizer)
        with quiet():
            self.lm = optional("lm_eval.models.huggingface", INSTALL).HFLM(
                model,
                tokenizer=tokenizer,
                batch_size=batch_size,
                max_length=self.max_length,
                softmax_dtype="float32",  # as finetune's, whatever the weights
            )

    def evaluate(
        self, subject: Subject, shots: int, calibrated: bool, seed: int
    ) -> list[dict[str, Any]]:
        """A row for each of the task's metrics, as lm_eval names and counts them.

        Every test example has demonstrations of its own from the training set, drawn as MeZO's
        code draws them (large_models/run.py without train_set_seed).

        Args:
            shots: demonstrations in a prompt.
            calibrated: adds the accuracy by log p(answer | prompt) - log p(answer), which divides
                out how likely an answer is by itself: surface form competition (arXiv 2104.08315)
                with an empty prompt in place of the question.
            seed: of the demonstrations; MeZO's is 0.

        Raises:
            UserError: the task has not enough examples for `shots`, can't be calibrated, or is one
                that lm_eval refuses.
        """
        if len(subject.train) < shots:
            raise UserError(
                f"there are {len(subject.train)} training examples of {subject.name} to take "
                f"{shots} demonstrations from"
            )
        task = copy.copy(subject.task)
        task.set_config("num_fewshot", shots)
        task.sampler = _Demonstrations(subject, seed)
        # lm_eval can't show one of several right answers that are given by number
        task.fewshot_cfg = replace(task.fewshot_cfg, doc_to_target=_first_right(task))
        if calibrated:
            _calibrate(task, subject)
        with quiet():
            evaluate = optional("lm_eval", INSTALL).evaluate
            try:
                made = evaluate(
                    self.lm,
                    {subject.name: task},
                    samples={subject.name: sorted(subject.test)},  # it goes by the set's order
                    bootstrap_iters=1000,  # for metrics that are no means
                )
            except AssertionError as refusal:  # such as no room for what is to be generated
                raise UserError(
                    f"lm_eval can't evaluate {subject.name}: {first_line(refusal)}"
                ) from refusal
        cut = sum(map(self._is_cut, made["samples"][subject.name]))
        results = made["results"][subject.name]
        rows = []
        for key, value in results.items():
            metric, comma, how = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = results.get(f"{metric}_stderr,{how}")
            rows.append(
                {
                    "task": subject.name,
                    "shots": shots,
                    "metric": metric if how == "none" else f"{metric} ({how})",
                    "value": float(value),
                    "standard_error": error if isinstance(error, float) else None,
                    "examples": len(subject.test),
                    "cut_prompts": cut,
                }
            )
        return rows

    def _is_cut(self, sample: Mapping[str, Any]) -> bool:
        """Whether a prompt lost its beginning, as the model does not take so many tokens."""
        for prompt, answer in sample["arguments"]:
            if isinstance(answer, str):  # whose last token is not read
                text, room = prompt + answer, self.max_length + 1
            else:  # how to generate one
                text, room = prompt, self.max_length - answer.get("max_gen_toks", 256)
            if len(self.lm.tok_encode(text)) > room:
                return True
        return False


class _Demonstrations:
    """lm_eval's sampler: a set for each test example, in the order in which it asks for them."""

    def __init__(self, subject: Subject, seed: int) -> None:
        self.train = subject.train
        seeds = np.random.RandomState(seed).randint(0, _SETS, len(subject.test)).tolist()
        self.seeds = iter([of for _, of in sorted(zip(subject.test, seeds, strict=True))])

    def sample(self, n: int, **_: Any) -> list[Mapping[str, Any]]:
        order = shuffled(len(self.train), next(self.seeds))
        return [self.train[i] for i in order[:n]]


def _first_right(task: Any) -> Any:
    def target(doc: Mapping[str, Any]) -> Any:
        right = task.doc_to_target(doc)
        return right[0] if isinstance(right, list) else right

    return target


def _calibrate(task: Any, subject: Subject) -> None:
    """Adds the metric to those of a task, which is a copy."""
    targets = (task.doc_to_target(task.eval_docs[i]) for i in subject.test)
    if (
        task.OUTPUT_TYPE != "multiple_choice"
        or task.multiple_input
        or callable(task.config.process_results)
        or any(isinstance(target, list) for target in targets)
    ):
        raise UserError(
            f"--calibrated is for tasks whose candidates follow one prompt and have one right "
            f"among them, which {subject.name} is not"
        )
    registry = optional("lm_eval.api.registry", INSTALL)
    task._metric_fn_list = task._metric_fn_list | {CALIBRATED: registry.get_metric(CALIBRATED)}
    task._aggregation_list = task._aggregation_list | {
        CALIBRATED: registry.get_metric_aggregation(CALIBRATED)
    }
    task._higher_is_better = task._higher_is_better | {CALIBRATED: True}
