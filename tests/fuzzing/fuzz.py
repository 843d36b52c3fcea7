"""Fuzzes the readers of files with atheris: ``python tests/fuzzing/fuzz.py SECONDS [READER ..]``,
so many seconds each.

An input that went wrong lies in ``build/fuzz/READER``. It belongs into ``found/READER``, where
tests read it again.
"""

from __future__ import annotations

import logging
import random
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from fuzzing.mutations import changed  # noqa: E402

INSTRUMENTED = ["zo_fused.step", "zo_fused.task", "zo_fused.cli", "zo_fused.replaying", "yaml"]


def fuzz(name: str, seconds: str) -> None:
    """One reader; libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED):
        from fuzzing.readers import FOUND, READERS

    logging.getLogger("zo_fused").setLevel(logging.ERROR)  # of the package: steps that are skipped
    reader, corpus = READERS[name], ROOT / "build/fuzz" / name
    corpus.mkdir(parents=True, exist_ok=True)
    seeds = reader.seeds()
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))

    def mutate(data: bytes, size: int, number: int) -> bytes:
        """libFuzzer's way, or a change in what a value is, often of a file that is good."""
        rng = random.Random(number)
        what = rng.random()
        if what < 0.3:
            return bytes(atheris.Mutate(data, size))
        return changed(rng.choice(seeds) if what < 0.8 else data, rng)[:size]

    options = [f"-max_total_time={seconds}", f"-artifact_prefix={corpus}/failed-", "-timeout=20"]
    options += ["-max_len=20000", "-rss_limit_mb=3000", "-print_final_stats=1"]
    found = [str(FOUND / name)] if (FOUND / name).is_dir() else []
    atheris.Setup(
        [sys.argv[0], *options, str(corpus), *found],
        lambda data: reader.once(data, folder),
        custom_mutator=mutate,
    )
    atheris.Fuzz()


def main(seconds: str, names: list[str]) -> int:
    """All of them; the number of those that failed."""
    from fuzzing.readers import READERS

    failed = 0
    for name in names or READERS:
        command = [sys.executable, __file__, "--one", name, seconds]
        run = subprocess.run(command, capture_output=True, text=True)
        lines = run.stderr.splitlines()
        count = next((line.split()[-1] for line in lines if "number_of_executed" in line), "?")
        print(f"{name}: {count} inputs", "" if run.returncode == 0 else "FAILED", flush=True)
        if run.returncode:
            failed += 1
            print((run.stdout + run.stderr)[-4000:])
    return failed


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        fuzz(*sys.argv[2:])
    sys.exit(main(sys.argv[1], sys.argv[2:]))
