"""Options of ``zo-fused finetune`` and ``compare`` from files: a user's, or a preset.

A file has the names and values of the command line. Values go through its parser as they are
written, so that there is one table of options, and one way to tell what is wrong with them.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from zo_fused.cli.parser import choice
from zo_fused.task.errors import UserError, first_line, optional

PRESETS = Path(__file__).parent / "presets"
_LINE_ONLY = ("help", "config", "overwrite")  # of a command, not of a run
_ONE_OF = ("steps", "forwards")
# several values, with commas between them on a line
_LISTS = ("methods", "report_to", "seeds", "betas", "delta")


def presets() -> list[str]:
    """The names of the presets."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def add_config_option(group: Any, help: str) -> None:
    """Adds the option that names a file."""
    group.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        help=f"YAML file with options{help}; what is on the command line goes before it",
    )


def add_preset_option(group: Any) -> None:
    """Adds the option that names a file of the package."""
    group.add_argument(
        "--preset",
        **choice(presets()),
        help="the settings of a paper's released code; a --config goes before it",
    )


def settable(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The options that a file may set."""
    return (action for action in parser._actions if action.dest not in _LINE_ONLY)


def merged(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    others: Mapping[str, str] = MappingProxyType({}),
) -> argparse.Namespace:
    """The arguments, completed by those of their --config and --preset.

    Args:
        parser: that made them, with every option None, or False, where it is not given.
        others: options of another command, and where they belong in a file of this one.

    Raises:
        UserError: a file can't be read, or has what is no option or no value of one.
    """
    layers = [args]
    if args.config is not None:
        layers.append(read(parser, args.config, others))
    names = (getattr(layer, "preset", None) for layer in layers)
    preset = next((name for name in names if name is not None), None)
    if preset is not None:
        layers.append(read(parser, PRESETS / f"{preset}.yaml"))
    whole = argparse.Namespace(**vars(args))
    for layer in layers[1:]:
        taken = any(getattr(whole, name, None) is not None for name in _ONE_OF)
        for action in settable(parser):
            name = action.dest
            if getattr(whole, name) is None and not (name in _ONE_OF and taken):
                setattr(whole, name, getattr(layer, name))
    return whole


def read(
    parser: argparse.ArgumentParser,
    path: Path,
    others: Mapping[str, str] = MappingProxyType({}),
) -> argparse.Namespace:
    """The options in a file.

    Raises:
        UserError: see `merged`.
    """
    yaml = optional("yaml")
    try:
        text = path.read_text(encoding="utf-8")
        _once(yaml, text)
        # every value is the text that stands there, 1e-6 and yes included
        content = yaml.load(text, yaml.BaseLoader) or {}
    except OSError as error:
        raise UserError(f"can't read the config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"can't read the config {path}: not UTF-8 text") from error
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f":{mark.line + 1}"
        raise UserError(
            f"{path}{line}: not YAML ({getattr(error, 'problem', None) or first_line(error)})"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a mapping of options, such as `lr: 1e-6`")
    words: list[str] = []
    known = {action.dest: action for action in settable(parser)}
    for key, value in content.items():
        name = f"{key}".replace("-", "_")
        if name in others:
            raise UserError(f"{path}: {key} {others[name]}")
        if name in _LINE_ONLY:
            raise UserError(f"{path}: {key} belongs on the command line")
        if name != key and name in content:
            raise UserError(f"{path}: {key} and {name} are one option")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0].replace('_', '-')!r}?" if near else ""
            raise UserError(f"{path}: there is no option {key!r}{hint}")
        words += _words(path, known[name], value)
    try:
        return parser.parse_args(words)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _once(yaml: Any, text: str) -> None:
    """Checks that no option of a file, and no key of a mapping in it, stands there twice."""
    whole = yaml.compose(text, yaml.BaseLoader)
    if not isinstance(whole, yaml.MappingNode):
        return
    values = [value for _, value in whole.value]
    for mapping in [whole, *(value for value in values if isinstance(value, yaml.MappingNode))]:
        seen = set()
        for key, _ in mapping.value:
            if str(key.value) in seen:
                problem = f"{key.value!r} stands there twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(str(key.value))


def _words(path: Path, action: argparse.Action, value: Any) -> list[str]:
    """An option as the command line has it."""
    flag = action.option_strings[0]
    if value == "":  # nothing behind the colon
        return []
    if value in ("null", "~"):
        raise UserError(f"{path}: {flag[2:]} has {value} as its value; put nothing there instead")
    if action.nargs == 0:
        if value not in ("true", "false"):
            raise UserError(f"{path}: {flag[2:]} must be true or false, not {value!r}")
        return [flag] if value == "true" else []
    if action.nargs == "+":
        items = list(value.values()) if isinstance(value, dict) else value
        if not (isinstance(items, list) and items) or not all(isinstance(i, str) for i in items):
            raise UserError(f"{path}: {flag[2:]} must be a mapping, such as `negative: ' bad'`")
        pairs = value.items() if isinstance(value, dict) else ()
        if split := [label for label, _ in pairs if "=" in label]:
            raise UserError(
                f"{path}: {flag[2:]} has a label with '=', {split[0]!r}: put template and "
                "verbalizer into a JSON file, and that behind task"
            )
        return [flag, *([f"{label}={answer}" for label, answer in pairs] or items)]
    if (
        action.dest in _LISTS
        and isinstance(value, list)
        and all(isinstance(item, str) for item in value)
    ):
        value = ",".join(value)
    if not isinstance(value, str):
        raise UserError(f"{path}: {flag[2:]} must be one value")
    return [f"{flag}={value}"]
