"""``zo-fused finetune``: options to `zo_fused.task.run`."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zo_fused.cli import defaults
from zo_fused.cli.config import merged
from zo_fused.cli.method_options import OPTIONS, by_method
from zo_fused.cli.run_options import add_options as add_options
from zo_fused.cli.run_options import run_parser
from zo_fused.step.interrupts import uninterrupted
from zo_fused.task.errors import (
    Interrupted,
    UserError,
    first_line,
    of_the_system,
    out_of_memory,
)

if TYPE_CHECKING:
    from zo_fused.task.lm_tasks import LmTask
    from zo_fused.task.options import Options
    from zo_fused.task.prompt import Task

HELP = "fine-tune a language model with forward passes only"

DESCRIPTION = """\
Fine-tune a language model, causal or masked, on a task with forward passes only.

With no arguments, the embedded model on the embedded data set: a run of a minute or two on a CPU.
With your own model and data, the same, with your options. The output directory becomes a model
directory of transformers, with the replay log, the history, a picture and a summary beside it."""

_PLAN = (
    "steps",
    "batch_size",
    "micro_batch_size",
    "eval_steps",
    "seed",
    "loss",
    "lr_scheduler",
)


def options(args: argparse.Namespace) -> Options:
    """The run that the arguments ask for.

    Raises:
        UserError: arguments that don't go together.
    """
    with uninterrupted():  # Ctrl-C in the middle would leave torch with half a NumPy
        from zo_fused.methods.table import recipes
        from zo_fused.task.lm_tasks import is_lm_task
        from zo_fused.task.options import Options
        from zo_fused.task.plan import Plan
        from zo_fused.task.scoring import WITHOUT_DERIVATIVE
        from zo_fused.task.splits import Draw

    embedded = args.model is None
    by_name = args.task is not None and is_lm_task(args.task)
    demo = embedded and args.train is None and not by_name
    if args.model is not None and args.train is None and not by_name:
        raise UserError(
            "--model needs --train, the data to fine-tune it on, or a --task that names a data set"
        )
    if args.train is None and (args.dev is not None or args.test is not None):
        raise UserError("--dev and --test need --train")
    if args.resume and args.overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    if args.steps is not None and args.forwards is not None:
        raise UserError("--steps and --forwards exclude each other")
    if embedded and not (defaults.EMBEDDED_MODEL / "config.json").is_file():
        raise UserError("this installation has no embedded model; give --model and --train")
    method = args.method or defaults.METHOD
    blocks, one_sided = args.blocks is not None, args.one_sided is not None
    table = defaults.defaults(method, embedded, args.peft, blocks, one_sided)
    for name in OPTIONS:
        if name not in table and getattr(args, name) is not None:
            raise UserError(
                f"--{name.replace('_', '-')} is no option of the method {method} "
                f"(see `zo-fused finetune --method {method} --help`)"
            )
    if blocks and args.schedule not in (None, "plain"):
        raise UserError("--blocks takes the schedule plain")
    if blocks and args.peft is not None:
        raise UserError("--blocks and --peft exclude each other: an adapter has no blocks")
    made, recipe = recipes()[method]
    if made.quantized and args.peft is not None:
        raise UserError(f"--peft and the method {method} exclude each other: it tunes no adapter")
    if args.k is not None and (args.train_examples or args.dev_examples):
        raise UserError("--k excludes --train-examples and --dev-examples")
    if args.loss in WITHOUT_DERIVATIVE and made.differentiates:
        raise UserError(f"--loss {args.loss} has no derivative, which the method {method} needs")

    def value(name: str) -> Any:
        given = getattr(args, name, None)  # a recipe may have more than the command line
        return table[name] if given is None else given

    task: Task | LmTask
    if by_name:
        task, sources = _task_by_name(args)
        table["loss"] = task.loss
        if task.generates and args.loss in ("classification", "accuracy"):
            raise UserError(
                f"the task {task.name} has no candidates for --loss {args.loss}; take lm, f1 or "
                "exact-match"
            )
    else:
        train = str(defaults.EMBEDDED_DATA) if args.train is None else args.train
        task, sources = _task(args, train), _sources(train, args.dev, args.test)
    model = str(defaults.EMBEDDED_MODEL) if embedded else args.model
    name = "the embedded model" if embedded else Path(model).name
    short = "demo" if demo else f"{'embedded' if embedded else Path(model).name}-{method}"
    return Options(
        model=model,
        sources=sources,
        task=task,
        method=method,
        hyper={name: value(name) for name in by_method()[method]},
        plan=Plan(**{name: value(name) for name in _PLAN}),
        forwards=args.forwards,
        peft=args.peft,
        max_length=value("max_length"),
        output=args.output or Path("zo-fused-runs") / short,
        report_to=args.report_to or (),
        label_field=value("label_field"),
        draw=Draw(
            args.train_examples, args.dev_examples, args.test_examples, args.k, value("data_seed")
        ),
        dtype=value("dtype"),
        device=value("device"),
        trust_remote_code=value("trust_remote_code"),
        resume="must" if args.resume is True else args.resume,
        overwrite=args.overwrite or (demo and args.output is None and not args.resume),
        title=f"{recipe.title} fine-tuning of {name}",
    )


def _task_by_name(args: argparse.Namespace) -> tuple[LmTask, dict[str, str]]:
    """The task of ``--task``, and where each split comes from: its data set, or local files."""
    from zo_fused.task.lm_tasks import LmTask

    if args.template is not None or args.verbalizer is not None:
        raise UserError("--task and --template exclude each other")
    for name in ("no_template", "label_field"):
        if getattr(args, name) is not None:
            raise UserError(
                f"--{name.replace('_', '-')} is for a task given by template and verbalizer, "
                f"not for --task {args.task}"
            )
    files = {} if args.train is None else _sources(args.train, args.dev, args.test)
    drawn = {"train": args.task, "dev": args.task} | ({} if files else {"test": args.task})
    return LmTask(args.task, files), drawn | files


def _sources(train: str, dev: str | None, test: str | None) -> dict[str, str]:
    """Where to read each split; those not given come from the training directory if it has them."""
    from zo_fused.task.data import split_file

    sources = {"train": train}
    for split, given in (("dev", dev), ("test", test)):
        if given is not None:
            sources[split] = given
        elif split_file(train, split) is not None:
            sources[split] = train
    return sources


def _task(args: argparse.Namespace, train: str) -> Task:
    """The task of ``--task``, of ``--template`` and ``--verbalizer``, or of the data's folder."""
    task = _worded_task(args, train)
    return task.without_words() if args.no_template else task


def _worded_task(args: argparse.Namespace, train: str) -> Task:
    from zo_fused.task.prompt import Task

    if (args.template is None) != (args.verbalizer is None):
        raise UserError("--template and --verbalizer need each other")
    if args.template is not None:
        if args.task is not None:
            raise UserError("--task and --template exclude each other")
        labels = [label for label, _ in args.verbalizer]
        twice = [label for label in labels if labels.count(label) > 1]
        if twice:
            raise UserError(f"--verbalizer has label {twice[0]!r} twice")
        return Task(args.template, dict(args.verbalizer))
    if args.task is not None:
        return Task.from_file(args.task)
    file = Path(train) / "task.json"
    if not file.is_file():
        raise UserError("no task: give --task, or --template and --verbalizer")
    return Task.from_file(file)


def run(args: argparse.Namespace, argv: list[str]) -> int:
    """Runs it and prints the summary; the exit code."""
    args = merged(run_parser(), args)
    chosen = options(args)

    from zo_fused.task.report import table
    from zo_fused.task.run import finetune

    try:
        summary = finetune(chosen)
    except Interrupted as stop:
        raise Interrupted(f"{stop}; {_again(argv, chosen)}", stop.number) from None
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise UserError(
            f"there is not enough memory ({first_line(error)}); --micro-batch-size, --max-length, "
            "--dtype bfloat16, fewer --queries or a smaller --rank take less; with memory for it, "
            + _again(argv, chosen)
        ) from error
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"{of_the_system(error)}; then {_again(argv, chosen)}") from error
    print(table(summary))
    what = "adapter" if args.peft else "model"
    files = "replay.jsonl, history.jsonl, curve.png and summary.json"
    print(f"the {what}, {files} are in {chosen.output}")
    return 0


def _again(argv: list[str], chosen: Options) -> str:
    """The command that goes on with a run, or begins it if it has not begun, in a sentence."""
    from zo_fused.task.resuming import has_begun

    words = list(argv)
    if has_begun(chosen.output) and chosen.resume is None:
        words = [*(word for word in argv if word != "--overwrite"), "--resume"]
    return f"go on with `{shlex.join(['zo-fused', *words])}`"
