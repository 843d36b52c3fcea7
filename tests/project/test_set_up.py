"""What `make setup` runs for which choice; pip itself is left out."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import set_up

THIS = str(Path(sys._base_executable).resolve())


class Commands(list[list[str]]):
    """The commands that were run; only those that make environments are carried out."""

    def __call__(self, *command: str | Path) -> None:
        self.append([str(word) for word in command])
        if "venv" in command:
            subprocess.run([*command, "--without-pip"], check=True)

    def installs(self) -> list[str]:
        """What was installed, without the constraints."""
        lines = [" ".join(words).partition(" install ")[2] for words in self if "pip" in words]
        return [re.sub(r"^-c \S+ ", "", line) for line in lines]


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    commands = Commands()
    monkeypatch.setattr(set_up, "run", commands)
    monkeypatch.setattr(sys, "platform", "linux")
    return commands


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    return tmp_path / "venv"


def system(monkeypatch: pytest.MonkeyPatch, **packages: str) -> None:
    """What the Python outside has."""
    lines = "\n".join(f"{name} {version}" for name, version in packages.items())
    answer = subprocess.CompletedProcess([], 0, stdout=lines)
    monkeypatch.setattr(set_up.subprocess, "run", lambda *a, **k: answer)


def test_default(commands: Commands, venv: Path, capsys: Any) -> None:
    set_up.set_up(venv, None, False)
    assert commands[0][-1] == str(venv)
    assert commands.installs() == ["torch", "setuptools>=77 ninja"]
    said = capsys.readouterr().out
    assert f"torch {set_up.pins()['torch']} with CUDA" in said
    assert "3 GB" in said
    assert "TORCH=cpu" in said


def test_cpu(commands: Commands, venv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = set_up.pins()["torch"]
    set_up.set_up(venv, "cpu", False)
    build = f"--no-deps --extra-index-url {set_up.CPU_INDEX} torch=={torch}+cpu"
    assert commands.installs() == [build, "torch", "setuptools>=77 ninja"]


def test_every_build_for_macos_is_for_the_cpu(
    commands: Commands, venv: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    set_up.set_up(venv, "cpu", False)
    assert commands.installs() == ["torch", "setuptools>=77 ninja"]
    assert "CUDA" not in capsys.readouterr().out


def test_system(commands: Commands, venv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing installs torch, and what follows is bound to the version that is there."""
    found = {"torch": "2.12.0a0+e5fc2aa", "triton": "3.6.0"}
    monkeypatch.setattr(set_up, "system_packages", lambda python: found)
    set_up.set_up(venv, "system", False)
    assert "--system-site-packages" in commands[0]
    assert commands.installs() == ["setuptools>=77 ninja"]
    lines = (venv / "constraints.txt").read_text().splitlines()
    assert {"torch==2.12.0a0+e5fc2aa", "triton==3.6.0"} < set(lines)
    assert not any(line.startswith("setuptools==") for line in lines)


@pytest.mark.parametrize(
    ("packages", "sentence"),
    [({"numpy": "2.0"}, "which has none"), ({"torch": "2.10.0+cu128"}, "that is torch 2.10.0")],
)
def test_system_without_a_torch_that_serves(
    packages: dict[str, str], sentence: str, venv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        system(patch, **packages)
        with pytest.raises(SystemExit, match=sentence):
            set_up.set_up(venv, "system", False)
    assert not venv.exists()
    system(monkeypatch, torch="2.11.0", triton="3.6.0", numpy="2.0")
    assert set_up.system_packages("python3") == {"torch": "2.11.0", "triton": "3.6.0"}


def test_a_choice_holds_until_another_is_made(commands: Commands, venv: Path, capsys: Any) -> None:
    set_up.set_up(venv, "cpu", False)
    capsys.readouterr()
    for again in (None, "cpu"):
        commands.clear()
        set_up.set_up(venv, again, True)
        assert commands == []
        assert capsys.readouterr().out == ""
    kept = venv / "kept"
    kept.touch()
    set_up.set_up(venv, "default", False)
    assert commands[0][1:4] == ["-m", "venv", "--clear"]
    assert not kept.exists()
    assert "anew, which had the CPU build of torch" in capsys.readouterr().out
    assert json.loads((venv / ".choice").read_text())["torch"] == "default"


def test_another_python(commands: Commands, venv: Path) -> None:
    """Kept unless one was named; then the environment is made anew."""
    set_up.set_up(venv, "cpu", False)
    choice = venv / ".choice"
    choice.write_text(json.dumps({"torch": "cpu", "python": "/opt/python3.14"}))
    commands.clear()
    set_up.set_up(venv, None, False)
    assert commands == []
    set_up.set_up(venv, None, True)
    assert commands[0] == [THIS, "-m", "venv", "--clear", str(venv)]
    assert json.loads(choice.read_text()) == {"torch": "cpu", "python": THIS}


def test_python_that_is_too_old(venv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 13, "final", 0))
    with pytest.raises(SystemExit, match=r"needs Python 3\.11 or newer, and .* is 3\.10"):
        set_up.set_up(venv, None, False)
    assert not venv.exists()


def test_what_failed_is_tried_again(
    commands: Commands, venv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*command: str | Path) -> None:
        commands(*command)
        if "torch" in command:
            raise subprocess.CalledProcessError(1, command)

    with monkeypatch.context() as patch:
        patch.setattr(set_up, "run", no_network)
        with pytest.raises(subprocess.CalledProcessError):
            set_up.set_up(venv, None, False)
    commands.clear()
    set_up.set_up(venv, None, False)
    assert commands.installs() == ["torch", "setuptools>=77 ninja"]


def test_new_pins_are_installed(commands: Commands, venv: Path) -> None:
    set_up.set_up(venv, "cpu", False)
    commands.clear()
    os.utime(venv / ".packages", (0, 0))  # older than constraints.txt
    set_up.set_up(venv, None, False)
    assert not any("venv" in words for words in commands)
    assert len(commands.installs()) == 3


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", ""),
        ("TORCH=cpu", "--torch cpu"),
        ("SYSTEM=1", "--system"),
        ("SYSTEM=0", ""),
        ("PYTHON=python3.13", "--this-python"),
    ],
)
def test_make_hands_on_what_was_written(words: str, expected: str) -> None:
    """And nothing that happens to be in the environment, but PYTHON."""
    command = ["make", "--dry-run", "setup", *words.split()]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "MAKEFLAGS")}
    planned = subprocess.run(
        command,
        check=True,
        capture_output=True,
        text=True,
        cwd=set_up.ROOT,
        env=environment | {"TORCH": "rocm", "SYSTEM": "Linux"},
    ).stdout
    line = next(line for line in planned.splitlines() if "set_up.py" in line)
    assert line.split()[2:] == [*expected.split(), ".venv"]
