"""Fuzzes the readers of files with atheris: ``python tests/fuzzing/fuzz.py SECONDS [READER ..]``.

Each reader has a process of its own, for libFuzzer ends with it. What it finds stays in
``build/fuzz/READER``; an input that went wrong goes from there into ``found/READER`` once it is
mended.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]


VALUES = [
    *(0, 1, -1, 2, 0.5, -0.0, 1e39, 1e-46, 1e308, 2**31, 2**53, 2**63, 2**64, 10**30, True, False),
    *(None, "", "x", "0.5", "\\ud83d", [], {}, [[]], [0], [None], {"": {}}, "restore", "adam", "MeZO"),
]


def mutated(value: Any, rng: random.Random) -> Any:
    """JSON with something in it that is something else."""
    inner = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    if not inner or rng.random() < 0.2:
        return rng.choice(VALUES)
    key, copy = rng.choice(list(inner)), value.copy()
    what = rng.random()
    if what < 0.1:
        del copy[key]
    elif what < 0.2 and isinstance(copy, list):
        copy.insert(key, rng.choice([copy[key], *VALUES]))
    elif what < 0.3 and isinstance(copy, dict):
        copy[rng.choice([*map(str, VALUES), *copy])] = rng.choice(VALUES)
    else:
        copy[key] = mutated(copy[key], rng)
    return copy


def mutate_lines(data: bytes, size: int, seed: int) -> bytes:
    """Half of the time in the values of lines of JSON, else libFuzzer's way."""
    import atheris

    rng = random.Random(seed)
    lines = data.split(b"\n")
    line = rng.randrange(len(lines))
    if rng.random() < 0.5:
        try:
            lines[line] = json.dumps(mutated(json.loads(lines[line]), rng)).encode()
            return b"\n".join(lines)[:size]
        except (ValueError, RecursionError):
            pass
    return atheris.Mutate(data, size)


def fuzz(name: str, seconds: int) -> None:
    """Ends the process."""
    import atheris

    package = ["zo_fused.step", "zo_fused.task", "zo_fused.cli", "zo_fused.replaying", "yaml"]
    with atheris.instrument_imports(include=package):
        from fuzzing.readers import FOUND, READERS

    corpus = ROOT / "build/fuzz" / name
    corpus.mkdir(parents=True, exist_ok=True)
    reader = READERS[name]
    for number, seed in enumerate(reader.seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
    found = [str(FOUND / name)] if (FOUND / name).is_dir() else []
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    options = [f"-max_total_time={seconds}", f"-artifact_prefix={corpus}/failed-", "-max_len=20000"]
    options += ["-timeout=20", "-rss_limit_mb=3000", "-print_final_stats=1", "-seed=1"]
    atheris.Setup([sys.argv[0], *options, str(corpus), *found], lambda data: reader.once(data, folder), custom_mutator=mutate_lines)
    atheris.Fuzz()


def main(seconds: int, names: list[str]) -> int:
    from fuzzing.readers import READERS

    failed = []
    for name in names or READERS:
        command = [sys.executable, __file__, "--one", name, str(seconds)]
        run = subprocess.run(command, capture_output=True, text=True)
        executed = [line.split()[-1] for line in run.stderr.splitlines() if "executed_units" in line]
        print(f"{name}: {executed[0] if executed else '?'} inputs, {'ok' if run.returncode == 0 else 'FAILED'}")
        if run.returncode:
            failed.append(name)
            print((run.stdout + run.stderr)[-4000:])
    return len(failed)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        fuzz(sys.argv[2], int(sys.argv[3]))
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
