"""From instruction counts to the fraction of a GPU's bandwidth that a sweep can reach.

The model: a sweep takes as long as the slowest of what it needs, memory or one of the pipes of a
multiprocessor, as if all else ran beside it. Assumptions, to be laid beside measurements:

* bandwidth is that of a device-to-device copy, as measured by others or assumed 10 % below peak;
* every scheduler issues one warp instruction a clock (NVIDIA: 128 lanes a clock and multiprocessor;
  AMD: 64 lanes a clock and compute unit), at the boost clock;
* pipes run at the rates of NVIDIA's programming guide; a 32 x 32 -> 64 bit product takes two slots;
  on AMD integer products and transcendental functions take four;
* of these bounds kernels reach 80 % (published timings of noise kernels lie at 85 to 91 % of the
  issue bound on Hopper, 67 to 76 % where memory is near).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

REACHED = 0.8  # of an arithmetic bound


class GPU(NamedTuple):
    target: str  # whose machine code it runs
    units: int  # multiprocessors or compute units
    clock: float  # GHz
    copy: float  # TB/s, bytes read and written
    rates: Mapping[str, int]  # lanes a clock and unit


_AMPERE = {"issue": 128, "fp32": 64, "integer": 64, "multiply": 64, "special": 16, "convert": 16}
_HOPPER = {**_AMPERE, "fp32": 128, "convert": 64}
_BLACKWELL = {**_HOPPER, "integer": 128}
_ADA = {**_HOPPER, "convert": 16}
_CDNA3 = {"issue": 64}

GPUS = {
    "A100": GPU("sm_80", 108, 1.41, 1.75, _AMPERE),
    "H100": GPU("sm_90", 132, 1.755, 3.0, _HOPPER),
    "H200": GPU("sm_90", 132, 1.755, 4.2, _HOPPER),
    "B200": GPU("sm_100", 148, 1.85, 7.0, _BLACKWELL),
    "RTX 4090": GPU("sm_80", 128, 2.52, 0.93, _ADA),  # sm_89 runs the code for sm_80
    "MI300X": GPU("gfx942", 304, 2.1, 4.2, _CDNA3),
}

# First match counts: pattern of the opcode, pipe, slots.
_PIPES = (
    (r"MUFU", "special", 1),
    (r"I2F|F2I|I2FP|F2F", "convert", 1),
    (r"IMAD\.(WIDE|HI)", "multiply", 2),
    (r"IMAD", "multiply", 1),
    (r"FFMA2|FMUL2|FADD2", "fp32", 2),
    (r"FFMA|FMUL|FADD|HADD2|HFMA2|HMUL2|F2FP", "fp32", 1),
    (r"LOP3|IADD|VIADD|LEA|SHF|SEL|ISETP|FSETP|PRMT|FMNMX|IMNMX|VIMNMX|FSEL|PLOP3", "integer", 1),
    (r"v_(mul_(lo|hi)_u32|mad_u64_u32|mul_lo)", "issue", 4),
    (r"v_(log|sqrt|sin|cos|rcp|rsq|exp)_f32", "issue", 4),
    (r"s_", "issue", 0),  # AMD's scalar unit works beside the vector unit
)


def slots(mix: Mapping[str, float]) -> dict[str, float]:
    """Slots of every pipe that an element takes, from opcodes per element."""
    taken: dict[str, float] = {"issue": 0.0}
    for opcode, count in mix.items():
        pipe, width = next(
            ((pipe, width) for pattern, pipe, width in _PIPES if re.match(pattern, opcode)),
            ("issue", 1),
        )
        if pipe != "issue":
            taken[pipe] = taken.get(pipe, 0.0) + width * count
        taken["issue"] += count * (width if pipe == "issue" else 1)
    return taken


def predict(mix: Mapping[str, float], bytes_per_element: float, gpu: str) -> tuple[float, str]:
    """The fraction of copy bandwidth that a sweep should reach, and what limits it.

    Args:
        mix: machine instructions per element, by opcode.
        bytes_per_element: read and written.
        gpu: a name of `GPUS`.
    """
    model = GPUS[gpu]
    memory = bytes_per_element / (model.copy * 1e12)  # seconds an element
    lanes = model.units * model.clock * 1e9
    times = {
        pipe: count / (model.rates[pipe] * lanes * REACHED) for pipe, count in slots(mix).items()
    }
    limit = max(times, key=lambda pipe: times[pipe])
    if times[limit] <= memory:
        return 1.0, "memory"
    return memory / times[limit], limit
