"""``zo-fused evaluate``: a model's answers to tasks, judged by lm_eval."""

from __future__ import annotations

import argparse
import importlib.metadata
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zo_fused.cli import defaults
from zo_fused.cli.parser import add_trust_option, data_seed, dtype_choice, whole
from zo_fused.step.interrupts import uninterrupted
from zo_fused.task.errors import UserError, first_line, out_of_memory, warn

if TYPE_CHECKING:
    from zo_fused.task.evaluating import Subject

HELP = "evaluate a model, tuned or not, by lm_eval: zero-shot, in context, calibrated"

DESCRIPTION = """\
Evaluate a causal language model by lm_eval: zero-shot, with demonstrations in the prompt,
calibrated, or tuned, which is to give finetune's output directory as the model.

With no arguments, the embedded model on the embedded test set. The test examples are those that
finetune draws with the same --test-examples and --data-seed."""


def _shots(text: str) -> list[int]:
    if not re.fullmatch(r"[0-9]{1,4}(,[0-9]{1,4})*", text):
        raise argparse.ArgumentTypeError(f"must be numbers such as 0 or 0,32, got {text!r}")
    return list(dict.fromkeys(map(int, text.split(","))))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument(
        "--model", metavar="DIR_OR_ID", help="model directory, such as finetune writes, or Hub id"
    )
    add_trust_option(parser)
    parser.add_argument(
        "--adapter",
        metavar="DIR",
        help="adapter of peft, such as finetune --peft writes; without --model, on the model that "
        "it was made for",
    )
    parser.add_argument(
        "--task",
        metavar="NAME_OR_FILE",
        action="append",
        help="as finetune takes it: a task of a paper or of lm_eval, or a file; may be repeated",
    )
    for split, what in (("train", "demonstrations are drawn from it"), ("test", "to be answered")):
        parser.add_argument(
            f"--{split}",
            metavar="DATA",
            help=f"as finetune takes it, in place of the task's own data set: {what}",
        )
    parser.add_argument(
        "--label-field", metavar="NAME", default="label", help="of template tasks (default: label)"
    )
    parser.add_argument(
        "--shots",
        metavar="N[,N]",
        type=_shots,
        default=[0],
        help="demonstrations in the prompt; 0,32 evaluates twice (default: 0)",
    )
    parser.add_argument(
        "--calibrated",
        action="store_true",
        help="also take from an answer's log-probability the one it has after an empty prompt",
    )
    parser.add_argument(
        "--test-examples",
        metavar="N",
        type=whole,
        help="draw so many (default: as finetune: 1000, or all of a template task)",
    )
    parser.add_argument(
        "--data-seed",
        metavar="SEED",
        type=data_seed,
        default=0,
        help="of the draws of test examples and demonstrations (default: 0)",
    )
    parser.add_argument("--batch-size", type=whole, default=8, help="prompts (default: 8)")
    parser.add_argument(
        "--dtype", **dtype_choice(), default="float32", help="of the weights (default: float32)"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: auto)")
    parser.add_argument("--output", metavar="FILE", type=Path, help="JSON file to write")


def _subjects(args: argparse.Namespace) -> list[Subject]:
    """The tasks, with their test examples drawn."""
    from zo_fused.task.evaluating import of_lm_task, of_template
    from zo_fused.task.lm_tasks import LmTask, is_lm_task
    from zo_fused.task.prompt import Task
    from zo_fused.task.splits import Draw

    draw = Draw(test=args.test_examples, seed=args.data_seed)
    names, train, test = args.task or [], args.train, args.test
    if not names and args.model is None and args.adapter is None and train is None:
        train = str(defaults.EMBEDDED_DATA)
    if not names:
        if train is None or not (Path(train) / "task.json").is_file():
            raise UserError("no task: give --task, or a folder with task.json and data as --train")
        names = [str(Path(train) / "task.json")]
    if len(names) > 1 and (train is not None or test is not None):
        raise UserError("--train and --test are of one --task")
    sources = _sources(train, test)
    if sources and "train" not in sources and max(args.shots) > 0:
        raise UserError("--shots needs --train, the data that demonstrations are drawn from")
    made = []
    for name in names:
        if is_lm_task(name):
            # without a training set of the user's, none is looked at
            files = {"train": sources["test"]} | sources if sources else {}
            made.append(of_lm_task(LmTask(name, files), draw))
        elif not sources:
            raise UserError(f"the task {name} needs --test, its data")
        else:
            path = Path(name).resolve()
            short = path.parent.name if path.stem == "task" else path.stem  # it lies by its data
            if path.parent == defaults.EMBEDDED_DATA.resolve():
                short = "embedded"
            task = Task.from_file(name)
            made.append(of_template(short, task, sources, draw, args.label_field))
    return made


def _sources(train: str | None, test: str | None) -> dict[str, str]:
    from zo_fused.task.data import split_file

    if train is not None and test is None and split_file(train, "test") is not None:
        test = train
    if train is not None and test is None:
        raise UserError("--train needs --test: the former is for demonstrations alone")
    given = {"train": train, "test": test}
    return {split: source for split, source in given.items() if source is not None}


def _model(args: argparse.Namespace, device: Any) -> tuple[Any, Any, str]:
    """The model, its tokenizer, and the name of the model, without the adapter's."""
    from zo_fused.task.adapters import load_saved, made_for
    from zo_fused.task.models import load_model, load_tokenizer

    trust = bool(args.trust_remote_code)
    if args.adapter is not None:
        name = args.model or made_for(args.adapter)
        model = load_saved(args.adapter, name, args.dtype, device, trust_remote_code=trust)
    else:
        name = args.model or str(defaults.EMBEDDED_MODEL)
        if (Path(name) / "adapter_config.json").is_file():
            raise UserError(f"{name} holds an adapter: give it as --adapter")
        model = load_model(name, args.dtype, device, trust)
    return model, load_tokenizer(name, trust), name


def _table(rows: list[dict[str, Any]]) -> str:
    """A line for each row; the widest cell gives a column's width."""
    lines = [["task", "shots", "metric", "value", "std. error", "examples"]]
    for row in rows:
        error = row["standard_error"]
        cells = [row["task"], row["shots"], row["metric"], f"{row['value']:.4f}"]
        cells += ["" if error is None else f"{error:.4f}", row["examples"]]
        lines.append(list(map(str, cells)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in (0, 2) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def run(args: argparse.Namespace, argv: list[str]) -> int:
    """Evaluates and prints the table; the exit code."""
    with uninterrupted():
        from zo_fused import __version__
        from zo_fused.task.evaluating import Evaluator
        from zo_fused.task.files import to_json, write_text
        from zo_fused.task.models import choose_device

    device = choose_device(args.device)
    if args.output is not None and not args.output.parent.is_dir():
        raise UserError(f"can't write {args.output}: there is no directory {args.output.parent}")
    if args.output is not None and args.output.is_dir():
        raise UserError(f"can't write {args.output}: it is a directory")
    subjects = _subjects(args)
    model, tokenizer, name = _model(args, device)
    evaluator = Evaluator(model, tokenizer, args.batch_size)
    rows = []
    try:
        for subject in subjects:
            for shots in args.shots:
                made = evaluator.evaluate(subject, shots, args.calibrated, args.data_seed)
                cut = made[0]["cut_prompts"]
                if cut:
                    warn(
                        f"{cut} of {len(subject.test)} prompts of {subject.name} with {shots} "
                        f"demonstrations lost their beginning: the model takes "
                        f"{evaluator.max_length} tokens"
                    )
                rows += made
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise UserError(
            f"there is not enough memory ({first_line(error)}); a smaller --batch-size, fewer "
            "--shots or --dtype bfloat16 take less"
        ) from error
    print(_table(rows))
    if args.output is not None:
        versions = {p: importlib.metadata.version(p) for p in ("lm_eval", "transformers", "torch")}
        content = {
            "zo_fused": __version__,
            **versions,
            "model": name,
            "adapter": args.adapter,
            "dtype": args.dtype,
            "device": str(device),
            "data_seed": args.data_seed,
            "results": rows,
        }
        write_text(args.output, to_json(content, indent=2) + "\n")
    return 0
