"""From PTX to what machine.cpp runs: names to numbers, nothing is optimized.

Whatever the machine does not know by name is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

# The first slots of a thread, as machine.cpp fills them.
SPECIAL = [
    f"%{name}.{axis}" for name in ("tid", "ctaid", "ntid", "nctaid") for axis in ("x", "y", "z")
]
POISON = 0xA5A5_A5A5_A5A5_A5A5  # what a register holds that nothing was written to

# Operations that do the same to signed and unsigned numbers, and those to floats, too.
SIGNLESS = {
    "add",
    "sub",
    "neg",
    "mul.lo",
    "mad.lo",
    "and",
    "or",
    "xor",
    "shl",
    "setp.eq",
    "setp.ne",
}
TYPELESS = {"mov", "selp"}


class Refused(Exception):
    """PTX that the machine does not know."""


@dataclass(frozen=True)
class Parameter:
    name: str
    offset: int  # from the first one's first byte
    size: int


@dataclass
class Instruction:
    """As machine.cpp has it, and its text."""

    text: str
    op: str
    guard: int = -1
    negated: bool = False
    d: int = 0
    a: int = 0
    b: int = 0
    c: int = 0
    value: int = 0


@dataclass
class Program:
    """A kernel."""

    name: str
    parameters: list[Parameter]
    code: list[Instruction] = field(default_factory=list)
    lists: list[int] = field(default_factory=list)  # of slots, for instructions that take many
    slots: list[int] = field(default_factory=list)  # what they hold at first


def entries(text: str) -> dict[str, str]:
    """The kernels of a PTX module, each with its text."""
    found = re.split(r"(?=\.entry\s)", text)[1:]
    return {_name(entry): entry for entry in found}


def _name(entry: str) -> str:
    match = re.match(r"\.entry\s+([\w$]+)", entry)
    assert match is not None
    return match[1]


def assemble(text: str, operations: Sequence[str]) -> Program:
    """The program of one kernel, from its text as `entries` has it.

    Raises:
        Refused: an instruction, or an operand, that is none of the machine's.
    """
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)
    head, _, body = text.partition("{")
    name, parameters = _head(head)
    return _Assembler(Program(name, parameters), operations).run(body)


def _width(type_: str) -> int:
    """Bytes of a value."""
    bits = re.fullmatch(r"[busf](8|16|32|64)", type_)
    if bits is None:
        raise Refused(f"type {type_}")
    return int(bits[1]) // 8


def _head(text: str) -> tuple[str, list[Parameter]]:
    parameters, offset = [], 0
    pattern = r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)[^,)]*?([\w$]+)(?:\[(\d+)\])?\s*(?=[,)\n])"
    for align, type_, parameter, length in re.findall(pattern, text):
        size = _width(type_) * int(length or 1)
        alignment = int(align or _width(type_))
        offset = -(-offset // alignment) * alignment
        parameters.append(Parameter(parameter, offset, size))
        offset += size
    assert len(parameters) == text.count(".param"), text
    return _name(text), parameters


class _Assembler:
    def __init__(self, program: Program, operations: Sequence[str]) -> None:
        self.program, self.operations = program, frozenset(operations)
        self.slots = {register: slot for slot, register in enumerate(SPECIAL)}
        self.program.slots = [0] * len(SPECIAL)
        self.declared: dict[str, int] = {}  # registers by prefix
        self.scopes: list[dict[str, str]] = [{}]  # other registers: what they are called here
        self.constants: dict[int, int] = {}  # slots
        self.labels: dict[str, int] = {}
        self.branches: list[tuple[Instruction, str]] = []

    def run(self, body: str) -> Program:
        for statement in self._statements(body):
            if statement.startswith(".reg "):
                self._declare(statement)
            elif not statement.startswith(".pragma "):
                self._instruction(statement)
        for instruction, label in self.branches:
            instruction.value = self.labels[label]
        last = self.program.code[-1]
        if last.op != "ret" or last.guard >= 0:
            raise Refused(f"{self.program.name} does not end in ret")
        return self.program

    def _statements(self, body: str) -> Iterator[str]:
        """What ends in a semicolon; labels, scopes and lines are seen to on the way."""
        token = re.compile(r"\s*(?:\.loc[^\n]*\n|([\w$]+):|(\{)|(\})|([^;]*);)")
        at = 0
        while self.scopes:
            match = token.match(body, at)
            assert match is not None, body[at : at + 80]
            at = match.end()
            label, opened, closed, statement = match.groups()
            if label:
                self.labels[label] = len(self.program.code)
            elif opened:
                self.scopes.append({})
            elif closed:
                self.scopes.pop()
            elif statement:
                yield " ".join(statement.split())

    def _declare(self, statement: str) -> None:
        for name in statement.split(None, 2)[2].split(","):
            family = re.fullmatch(r"\s*(%[a-z]+)<(\d+)>", name)
            if family:
                self.declared[family[1]] = int(family[2])
            else:
                name = name.strip()
                self.scopes[-1][name] = f"{name} of {len(self.program.code)}"

    # ---- operands -------------------------------------------------------------------------------

    def _new(self, value: int) -> int:
        self.program.slots.append(value)
        return len(self.program.slots) - 1

    def _register(self, name: str) -> int:
        if name == "_":
            return self._new(POISON)
        found = next((scope[name] for scope in reversed(self.scopes) if name in scope), None)
        if found is None:
            member = re.fullmatch(r"(%[a-z]+)(\d+)", name)
            if name not in SPECIAL and (
                member is None or int(member[2]) >= self.declared.get(member[1], 0)
            ):
                raise Refused(f"register {name}")
            found = name
        if found not in self.slots:
            self.slots[found] = self._new(POISON)
        return self.slots[found]

    def _operand(self, text: str) -> int:
        """The slot of a register or constant."""
        if re.fullmatch(r"0[fF][\da-fA-F]{8}", text):
            value = int(text[2:], 16)
        elif re.fullmatch(r"-?(0x[\da-fA-F]+|\d+)U?", text):
            value = int(text.rstrip("U"), 0) % 2**64
        else:
            return self._register(text)
        if value not in self.constants:
            self.constants[value] = self._new(value)
        return self.constants[value]

    def _list(self, text: str) -> tuple[int, int]:
        """Where the slots of ``{%r1, %r2}``, or of one register, stand, and how many they are."""
        slots = [self._operand(name.strip()) for name in text.strip("{}").split(",")]
        self.program.lists += slots
        return len(self.program.lists) - len(slots), len(slots)

    # ---- instructions ---------------------------------------------------------------------------

    def _instruction(self, text: str) -> None:
        extended = re.fullmatch(r"ld\.param\.s32 (%\S+), (.*)", text)
        if extended is not None:  # into a register of 64 bits
            self._instruction(f"ld.param.b32 {extended[1]}, {extended[2]}")
            self._instruction(f"cvt.s64.s32 {extended[1]}, {extended[1]}")
            return
        guarded = re.fullmatch(r"(?:@(!?)(\S+) )?(\S+)(?: (.*))?", text)
        assert guarded is not None, text
        negated, guard, op, rest = guarded.groups()
        operands = [x.strip() for x in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,])+", rest or "")]
        made = Instruction(text, op)
        try:
            if guard:
                made.guard, made.negated = self._register(guard), negated == "!"
            self._decode(made, operands)
        except Refused as refused:
            raise Refused(f"{refused} in {text!r} of {self.program.name}") from None
        self.program.code.append(made)

    def _decode(self, made: Instruction, operands: list[str]) -> None:
        kind, *modifiers = made.op.split(".")
        if kind in ("ld", "st"):
            self._access(made, kind, modifiers, operands)
        elif kind == "mov" and any(x.startswith("{") for x in operands):
            self._parts(made, _width(modifiers[0]), operands)
        elif made.op in ("bra", "bra.uni"):
            made.op = "bra"
            self.branches.append((made, operands[0]))
        elif made.op == "shfl.sync.idx.b32":
            made.d = self._register(operands[0].partition("|")[0])
            made.a, made.b, made.c, made.value = map(self._operand, operands[1:])
        elif made.op != "ret":
            made.op = _plain(made.op)
            made.d = self._register(operands[0])
            slots = [self._operand(x) for x in operands[1:]]
            made.a, made.b, made.c = [*slots, 0, 0, 0][:3]
        if made.op not in self.operations:
            raise Refused(f"operation {made.op}")

    def _access(
        self, made: Instruction, kind: str, modifiers: list[str], operands: list[str]
    ) -> None:
        space, *vector, type_ = modifiers
        memory, registers = operands if kind == "st" else reversed(operands)
        address = re.fullmatch(r"\[\s*(%?[\w$]+)\s*(?:\+\s*(-?\d+)\s*)?\]", memory)
        if address is None or space not in ("global", "param"):
            raise Refused(f"access {memory}")
        if type_[0] == "s":
            raise Refused(f"type {type_}")  # might have to extend the sign
        base, made.value, made.b = address[1], int(address[2] or 0), _width(type_)
        made.d, made.c = self._list(registers)
        if [f"v{made.c}"] * (made.c > 1) != vector:
            raise Refused(f"{made.c} registers")
        if space == "global":
            made.op, made.a = kind, self._register(base)
            return
        made.op = f"{kind}.param"
        found = next((p for p in self.program.parameters if p.name == base), None)
        if found is None or not 0 <= made.value <= found.size - made.b * made.c:
            raise Refused(f"access {memory}")
        made.value += found.offset

    def _parts(self, made: Instruction, width: int, operands: list[str]) -> None:
        """A value from or to its parts."""
        into, source = operands
        packs = source.startswith("{")
        made.op = "pack" if packs else "unpack"
        made.a = self._operand(into if packs else source)
        made.d, made.c = self._list(source if packs else into)
        made.b = width // made.c


def _plain(op: str) -> str:
    """The machine's name of an operation."""
    kind, _, type_ = op.rpartition(".")
    if (kind in SIGNLESS and type_[0] in "us") or (kind in TYPELESS and type_[0] in "usf"):
        return f"{kind}.b{type_[1:]}"
    return op
