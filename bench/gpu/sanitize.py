"""Every kernel of a GPU backend over awkward tensors, compared with the reference bit for bit.

``python -m bench.gpu.sanitize`` is made to run under ``compute-sanitizer``: many small launches
over aligned, misaligned, odd-sized and empty tensors, through every branch of the kernels. It exits
with 1 if a result differs or memory beside a tensor was written. With ``--guard 0`` and
``PYTORCH_NO_CUDA_MEMORY_CACHING=1`` a tensor ends where its memory does, so that memcheck sees
every read beyond it. The GPU tests run the same cases.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from typing import Any

import torch
from torch import Tensor

import zo_fused
from bench.gpu.sweep_cases import FAMILIES, Case
from zo_fused.sweeps import dispatch, operators

POISON = 77


def written(operator: str) -> list[str]:
    """The arguments that an operator writes."""
    schema = getattr(operators, operator).default._schema
    return [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]


class Islands:
    """Tensors in poisoned memory, each `misalignment` elements past a 16-byte boundary."""

    def __init__(self, device: torch.device, misalignment: int, guard: int) -> None:
        self.device, self.start, self.guard = device, guard + misalignment, guard
        self.made: list[tuple[Tensor, int]] = []

    def put(self, x: Tensor) -> Tensor:
        end = self.start + x.numel()
        memory = torch.full((end + self.guard,), POISON, dtype=x.dtype).to(self.device)
        memory[self.start : end].copy_(x.flatten())
        self.made.append((memory, end))
        return memory[self.start : end].view(x.shape)

    def intact(self) -> bool:
        """Whether nothing was written beside a tensor."""
        beside = [(memory[: self.start], memory[end:]) for memory, end in self.made]
        return all(bool((x.cpu() == POISON).all()) for pair in beside for x in pair)


def run(
    case: Case, backend: str, device: torch.device, misalignment: int = 0, guard: int = 64
) -> tuple[list[Tensor], bool]:
    """What a backend makes of a case, on the CPU, and whether it wrote nothing else."""
    islands = Islands(device, misalignment, guard)

    def placed(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [islands.put(x) for x in value]
        if isinstance(value, Tensor) and name not in ("ids", "offsets", "script"):
            return value.to(device)
        return value

    arguments = {name: placed(name, value) for name, value in case.arguments.items()}
    previous = zo_fused.set_backend(backend)
    try:
        getattr(operators, case.operator)(**arguments)
    finally:
        zo_fused.set_backend(previous)
    results = [x.cpu() for name in written(case.operator) for x in arguments[name]]
    return results, islands.intact()


def expected(case: Case) -> list[Tensor]:
    """What the reference makes of a case (of the fast transform: what it is close to)."""
    given = dict(case.arguments)
    if not case.exact:
        given["transform"] = "portable"
    slow = Case(case.name, case.operator, given)
    return run(slow, "reference", torch.device("cpu"))[0]


def _bits(x: Tensor) -> Tensor:
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def difference(got: Tensor, wanted: Tensor, exact: bool = True) -> str | None:
    """How a result differs from what was wanted, or None."""
    if got.dtype != wanted.dtype or got.shape != wanted.shape:
        return f"{got.dtype} {tuple(got.shape)} for {wanted.dtype} {tuple(wanted.shape)}"
    if exact:
        different = _bits(got) != _bits(wanted)
    else:  # normals are within 1e-3; coefficients below 5, of three directions
        rtol = 2 * torch.finfo(wanted.dtype).eps  # one step of stochastic rounding
        different = ~torch.isclose(got.double(), wanted.double(), rtol=rtol, atol=2e-2)
    places = different.flatten().nonzero().flatten()
    if not len(places):
        return None
    first = int(places[0])
    return (
        f"{len(places)} of {got.numel()} elements differ, the first at {first}: "
        f"{got.flatten()[first]} for {wanted.flatten()[first]}"
    )


def differences(
    case: Case,
    backend: str,
    device: torch.device,
    misalignments: tuple[int, ...] = (0, 1),
    guard: int = 64,
) -> list[str]:
    """Everything in which a backend departs from the reference."""
    wanted = expected(case)
    found = []
    for misalignment in misalignments:
        got, intact = run(case, backend, device, misalignment, guard)
        label = f"{case.name}, misaligned by {misalignment}"
        if not intact:
            found.append(f"{label}: wrote beside a tensor")
        for number, (g, w) in enumerate(zip(got, wanted, strict=True)):
            problem = difference(g, w, case.exact)
            if problem is not None:
                found.append(f"{label}, tensor {number}: {problem}")
    return found


def served(case: Case, backend: str) -> bool:
    """Whether the backend knows the transform of a case."""
    return case.arguments.get("transform", "portable") in dispatch.load(backend).TRANSFORMS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--guard", type=int, default=64, help="poisoned elements round tensors")
    parser.add_argument("--run-only", action="store_true", help="compare nothing: compile")
    parser.add_argument(
        "--part", nargs=2, type=int, default=(0, 1), metavar=("K", "N"), help="case K, K + N, .."
    )
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), choices=list(FAMILIES))
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.backend not in dispatch.BACKENDS:
        print(f"no backend {options.backend!r}", file=sys.stderr)
        return 2
    reason = dispatch.why_not(options.backend, device.type)
    if reason is not None:
        print(f"{options.backend}: {reason}", file=sys.stderr)
        return 2
    failures = 0
    for family in options.families:
        start, count = time.monotonic(), 0
        first, stride = options.part
        for case in itertools.islice(FAMILIES[family](), first, None, stride):
            if served(case, options.backend):
                count += 1
                if options.run_only:
                    run(case, options.backend, device)
                    continue
                found = differences(case, options.backend, device, guard=options.guard)
                failures += len(found)
                print("\n".join(found), end="\n" * bool(found), flush=True)
        seconds = time.monotonic() - start
        print(f"{family}: {count} cases, {seconds:.1f} s", flush=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"{failures} differences from the reference")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
