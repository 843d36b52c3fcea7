"""Makes the virtual environment of a checkout, with the torch that was chosen.

    python3 tools/set_up.py [--torch default|cpu | --system] [--this-python] DIRECTORY

`make setup` runs it each time, with any Python 3. A choice holds until another is made, which
starts the environment anew; with nothing to do, nothing is done.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
TORCHES = {
    "default": "the torch that pip chooses",
    "cpu": "the CPU build of torch",
    "system": "the torch of the system",
}
OLDEST_PYTHON = (3, 11)
OLDEST_TORCH = (2, 11)


def say(message: str) -> None:
    print(f"set-up: {message}", flush=True)


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True)


def pins() -> dict[str, str]:
    """constraints.txt: package -> version."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def system_packages(python: str) -> dict[str, str]:
    """Versions of torch and Triton that a Python has, to be used as they are.

    Raises:
        SystemExit: there is no torch, or an old one.
    """
    code = (
        "from importlib.metadata import distributions as d\n"
        "for p in d(): print(p.metadata['Name'], p.version)"
    )
    lines = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout
    versions = dict(line.split() for line in lines.splitlines())
    found = {name: versions[name] for name in ("torch", "triton") if name in versions}
    if "torch" not in found:
        sys.exit(
            f"SYSTEM=1 takes the torch of {python}, which has none; leave it out, or name "
            "another Python (PYTHON=...)"
        )
    if tuple(map(int, found["torch"].split(".")[:2])) < OLDEST_TORCH:
        sys.exit(
            f"SYSTEM=1 takes the torch of {python}, but that is torch {found['torch']} and "
            f"zo_fused needs {'.'.join(map(str, OLDEST_TORCH))} or newer; leave SYSTEM=1 out, "
            "or name another Python (PYTHON=...)"
        )
    return found


def announce(torch: str, versions: dict[str, str]) -> None:
    """Says what will be fetched. Sizes are sums over the packages of constraints.txt."""
    linux = sys.platform == "linux"
    if torch == "system":
        what, size = f"torch {versions['torch']} is there; the other packages", "0.3 to 0.5 GB"
    elif torch == "default" and linux:
        what, size = f"torch {versions['torch']} with CUDA, and the other packages", "3 GB"
    else:
        size = "0.7 GB" if linux else "0.3 GB"
        what = f"torch {versions['torch']} for the CPU, and the other packages"
    say(f"{what}: about {size} to fetch, less what pip has cached or finds elsewhere")
    if torch == "default" and linux:
        say("5 GB on disk; without a GPU, `make setup TORCH=cpu` needs 0.7 GB and 2.5 GB")


def set_up(venv: Path, torch: str | None, this_python: bool) -> None:
    """Makes or updates an environment, or leaves it as it is.

    Args:
        venv: its directory.
        torch: one of `TORCHES`; None keeps what was chosen.
        this_python: whether this Python was chosen; otherwise, that of the environment is kept.

    Raises:
        SystemExit: this Python or the system's torch is too old.
        CalledProcessError: pip failed.
    """
    chosen, done = venv / ".choice", venv / ".packages"
    before = json.loads(chosen.read_text()) if chosen.exists() else {}
    # Not that of an active environment, and one name of it.
    this = str(Path(getattr(sys, "_base_executable", sys.executable)).resolve())
    choice = {
        "torch": torch or before.get("torch", "default"),
        "python": this if this_python else before.get("python", this),
    }
    sources = [ROOT / "constraints.txt", ROOT / "pyproject.toml", Path(__file__)]
    newest = max(source.stat().st_mtime for source in sources)
    if choice == before and done.exists() and done.stat().st_mtime >= newest:
        return

    torch, python, system = choice["torch"], choice["python"], choice["torch"] == "system"
    if python == this and sys.version_info < OLDEST_PYTHON:
        sys.exit(
            f"zo_fused needs Python {'.'.join(map(str, OLDEST_PYTHON))} or newer, and {this} is "
            f"{sys.version_info[0]}.{sys.version_info[1]}; name another with PYTHON=..."
        )
    versions = pins()
    if system:
        versions.update(system_packages(python))
        del versions["setuptools"]  # older torches want older ones
    if choice != before:
        if before:
            say(f"starts {venv} anew, which had {TORCHES[before['torch']]}, {before['python']}")
        announce(torch, versions)
        options = ["--clear"] * bool(before) + ["--system-site-packages"] * system
        run(python, "-m", "venv", *options, venv)
        chosen.write_text(json.dumps(choice))  # now: what comes may fail, and be tried again
    constraints = venv / "constraints.txt"
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in versions.items()))

    pip = [venv / "bin/python", "-m", "pip", "--disable-pip-version-check", "install"]
    # torch first, or the packages that need it would fetch another build of it.
    if torch == "cpu" and sys.platform == "linux":
        cpu = f"torch=={versions['torch']}+cpu"  # that index has other versions of what torch needs
        run(*pip, "--no-deps", "--extra-index-url", CPU_INDEX, cpu)
    if not system:
        run(*pip, "-c", constraints, "torch")
    run(*pip, "-c", constraints, "setuptools>=77", "ninja")
    done.touch()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("venv", type=Path, metavar="DIRECTORY")
    torch = parser.add_mutually_exclusive_group()
    torch.add_argument("--torch", choices=("default", "cpu"), help="if not given: as before")
    torch.add_argument("--system", dest="torch", action="store_const", const="system")
    parser.add_argument("--this-python", action="store_true", help="also if it had another Python")
    args = parser.parse_args()
    try:
        set_up(args.venv, args.torch, args.this_python)
    except subprocess.CalledProcessError as error:
        sys.exit(f"set-up failed, see above: {' '.join(map(str, error.cmd))}")


if __name__ == "__main__":
    main()
