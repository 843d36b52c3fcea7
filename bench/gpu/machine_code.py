"""Machine code of GPUs as compilers print it, and the path that nearly all elements take."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from typing import Any, NamedTuple

SEARCH_STEPS = 10  # to find one of a thousand parameters in the table
_STORES_128 = ("STG.E.128", "buffer_store_dwordx4", "global_store_dwordx4")


class Unit(NamedTuple):
    """What a thread does at a time on its fast path."""

    elements: int
    stores: int  # of 128 bits
    in_program: int  # units that a program takes one after the other
    bytes: float  # read and written, per element
    trips: int = 1  # of a loop within


class Instruction(NamedTuple):
    address: int
    opcode: str
    conditional: bool
    target: int | None  # where a branch goes

    @property
    def ends(self) -> bool:
        return self.opcode in ("EXIT", "s_endpgm")

    @property
    def stores_128(self) -> bool:
        return self.opcode.startswith(_STORES_128)


def parse_sass(text: str) -> list[Instruction]:
    """The instructions of a function in cuobjdump's output, without padding."""
    line = re.compile(
        r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)\s*([^;]*);", re.M
    )
    found = []
    for address, predicate, opcode, operands in line.findall(text):
        target = None
        if opcode.startswith(("BRA", "CALL.REL.NOINC")):  # ptxas may leave a loop by a call
            target = int(operands.split("0x")[-1].rstrip(" `()"), 16)
        conditional = bool(predicate) or (target is not None and "," in operands)
        if opcode != "NOP":
            found.append(Instruction(int(address, 16), opcode, conditional, target))
    return found


def parse_gcn(text: str) -> list[Instruction]:
    """The instructions of an AMD kernel in assembler, numbered in place of addresses."""
    labels: dict[str, int] = {}
    lines: list[tuple[str, str]] = []
    for line in text.splitlines():
        if match := re.match(r"^(\.LBB\w+):", line):
            labels[match[1]] = len(lines)
        elif match := re.match(r"^\s+([sv]_\w+|global_\w+|buffer_\w+|ds_\w+)\s*([^;]*)", line):
            lines.append((match[1], match[2].strip()))
    return [
        Instruction(
            i,
            opcode,
            opcode.startswith("s_cbranch"),
            labels[operands] if opcode.startswith(("s_cbranch", "s_branch")) else None,
        )
        for i, (opcode, operands) in enumerate(lines)
    ]


def shortest_path(code: list[Instruction], stores: int) -> list[Instruction] | None:
    """The shortest way from the first instruction to an end, or back to where it has been, that
    stores 128 bits so many times."""
    addresses = [step.address for step in code]
    # By instruction: length of the rest of the way by the stores on it, and the next instruction.
    rest: list[dict[int, tuple[int, int | None]]] = [{} for _ in code]
    for i in reversed(range(len(code))):
        step = code[i]
        ends, following = step.ends, [i + 1]
        if step.ends or step.target is not None:
            following = [i + 1] if step.conditional else []
        if step.target is not None:
            if step.target > step.address:
                following.append(bisect_left(addresses, step.target))  # it may be padding
            elif not step.conditional:
                ends = True
        here = int(step.stores_128)
        ways = [(here, 1, None)] if ends else []
        for j in following:
            if j < len(code):
                ways += [(n + here, length + 1, j) for n, (length, _) in rest[j].items()]
        for n, length, j in ways:
            if n <= stores and (n not in rest[i] or length < rest[i][n][0]):
                rest[i][n] = (length, j)
    path: list[Instruction] = []
    at: int | None = 0
    while at is not None:
        if stores not in rest[at]:
            return None
        path.append(code[at])
        at, stores = rest[at][stores][1], stores - code[at].stores_128
    return path


def loops(code: list[Instruction]) -> list[range]:
    """Addresses of every loop, from where it is entered to where it goes back."""
    return [
        range(step.target, step.address + 1)
        for step in code
        if step.target is not None and step.target < step.address
    ]


def fast_path(code: list[Instruction], unit: Unit) -> dict[str, Any] | None:
    """The path of a unit that fills its place in a parameter: all its weights in 128-bit stores.

    Returns:
        ``inside``: opcodes for a unit; ``mix``: opcodes per element, with what a program does once
        shared out among its elements. None: no such path.
    """
    path = shortest_path(code, unit.stores)
    if path is None:
        return None
    store = next(step.address for step in path if step.stores_128)
    around = [loop for loop in loops(code) if store in loop]
    body = min(around, key=len) if around else range(1 << 62)
    # The first loop of every kernel searches the table; a path may go past it.
    before = [loop for loop in loops(code) if loop.stop <= body.start]
    search = min(before, key=lambda loop: loop.start, default=range(0))
    inner = [loop for loop in loops(code) if store not in loop and loop.start in body]
    inside: Counter[str] = Counter()
    once: Counter[str] = Counter()
    for step in path:
        if step.address in body:
            inside[step.opcode] += unit.trips if any(step.address in x for x in inner) else 1
        elif step.address not in search:
            once[step.opcode] += 1
    for step in code:
        if step.address in search:
            once[step.opcode] += SEARCH_STEPS
    mix: Counter[str] = Counter()
    for opcodes, elements in ((inside, 1), (once, unit.in_program)):
        for opcode, count in opcodes.items():
            mix[opcode] += count / elements / unit.elements
    return {"inside": inside, "mix": mix, "per_element": sum(mix.values())}
