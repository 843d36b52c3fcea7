"""Sweeps, whole steps and their rivals on a GPU: numbers into one JSON file, then a report.

``python -m bench.gpu.main --out DIR`` writes ``gpu.json`` row by row, so a run that is cut short
keeps what it had, and at the end ``gpu.md`` with two plots (`report`). Sections run in the order
of their importance until ``--budget`` seconds are spent. A section that fails is recorded and the
rest goes on; where it left the CUDA context broken, in a fresh process. ``--device cpu --quick``
goes through the same code on CPU tensors, to test it.

How a number is made: everything is warmed up (compiled) first; contenders whose ratio is reported
take turns; medians are reported. Sweeps go over more memory than any cache holds and are timed on
the device between events, steps on the host from synchronisation to synchronisation.
"""

from __future__ import annotations

import os

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # few kernels: no pool of compilers

import argparse
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from bench import machine
from bench.gpu import report
from bench.gpu.measure import Bench, OutOfTimeError, Record, copy
from bench.gpu.rivals import rivals
from bench.gpu.steps import graphs, overhead, steps
from bench.gpu.sweeps import sweeps
from bench.models import DTYPES


def end(bench: Bench) -> None:
    """Section: the copy once more, to see whether the clocks held."""
    copy(bench)
    if bench.on_gpu:
        bench.record.data["machine"]["state at end"] = machine.gpu_state()


def sections(bench: Bench) -> dict[str, Callable[[Bench], None]]:
    """Most important first."""

    def of_dtype(dtype: str) -> dict[str, Callable[[Bench], None]]:
        return {f"sweeps {dtype} {b}": sweeps(dtype, b) for b in bench.backends}

    large, small = ("opt-tiny", None) if bench.quick else ("opt-13b", "opt-1.3b")
    return {
        "copy": copy,
        **of_dtype("fp16"),
        f"steps {large}": steps(large),
        **({f"steps {small}": steps(small)} if small else {}),
        "rivals": rivals,
        "graphs": graphs,
        "overhead": overhead,
        **of_dtype("bf16"),
        **of_dtype("fp32"),
        "end": end,
    }


def broken(bench: Bench, error: Exception) -> bool:
    """Whether after this error every further CUDA call fails."""
    if "CUDA error" in str(error):
        return True
    try:
        bench.synchronize()
    except Exception:
        return True
    return False


def run(bench: Bench) -> bool:
    """All sections that are not done. False: a fresh process must do the rest."""
    data = bench.record.data
    for name, section in sections(bench).items():
        if name in data["done"]:
            continue
        data["done"].append(name)
        started, finished = time.monotonic(), True
        try:
            if name != "end":
                bench.check_time()
            section(bench)
            bench.synchronize()  # an error may come late
        except OutOfTimeError:
            data["stopped"] = True
            bench.record.skip(name, f"the budget of {data['budget']} s was spent")
        except Exception as error:
            traceback.print_exc()
            bench.record.row("errors", section=name, error=f"{type(error).__name__}: {error}")
            if name == "copy":
                raise
            finished = not (bench.on_gpu and broken(bench, error))
        data["seconds"][name] = round(time.monotonic() - started, 1)
        bench.record.save()
        report.write(bench.record.path.parent, plots=False)  # a run may be killed at any time
        if not finished:
            return False
        gc.collect()  # optimizers lie in cycles
        if bench.on_gpu:
            torch.cuda.empty_cache()
    return True


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--budget", type=float, default=270.0, help="seconds")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, few repeats")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--sass", type=Path, help="output of `sass.py --json`, for predictions")
    parser.add_argument("--resume", action="store_true", help="go on with what is not done")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "gpu.json"
    if options.resume:
        data = json.loads(path.read_text(encoding="utf-8"))
    else:
        data = {
            "machine": machine.facts(options.device),
            "quick": options.quick,
            "budget": options.budget,
            "deadline": time.time() + options.budget,
            "stopped": False,
            "finished": False,
            "done": [],
            "seconds": {},
        }
    bench = Bench(options, Record(path, data))
    with torch.no_grad():
        if not run(bench):
            sys.stdout.flush()
            again = [argument for argument in sys.orig_argv[1:] if argument != "--resume"]
            os.execv(sys.executable, [sys.executable, *again, "--resume"])
    data["finished"] = True
    bench.record.save()
    report.write(options.out)
    return int("errors" in data)


if __name__ == "__main__":
    sys.exit(main())
