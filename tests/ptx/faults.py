"""Faults to plant into the PTX of a kernel, such as a compiler, or a change of its options, could
make. Each changes something in every kernel that it is meant for."""

from __future__ import annotations

import re
from collections.abc import Callable


def another_constant(text: str) -> str:
    """A factor of Philox is another one where it occurs first."""
    return re.sub(r" (-766435501|3528531795);", " 3528531793;", text, count=1)


def no_masks(text: str) -> str:
    """Stores of single elements are made whether or not there is such an element: without the guard
    that Triton gives them, or the branch over them that nvcc makes."""
    text = re.sub(r"@!?%p\d+ (st\.global\.b(?:16|32|64)\b)", r"\1", text)
    inside = r"(?:(?!bra|\$L).*\n)*?"
    over = rf"@!?%p\d+ bra\s+(\$\w+);({inside}.*st\.global\.(?:[uf]\d+)\s.*\n\s*\1:)"
    return re.sub(over, r"\2", text)


def flushes(text: str) -> str:
    """Factors and products that are subnormal count as zero (nvcc's ``-ftz=true``)."""
    return text.replace("mul.rn.f32 ", "mul.rn.ftz.f32 ")


def contracts(text: str) -> str:
    """A sum of a product is rounded once (nvcc's ``-fmad=true``)."""
    products = dict(re.findall(r"mul\.rn\.f32\s+(\S+), (\S+, \S+);", text))

    def fused(match: re.Match[str]) -> str:
        into, a, b = match.groups()
        if b in products:
            a, b = b, a
        return f"fma.rn.f32 {into}, {products[a]}, {b};" if a in products else match[0]

    return re.sub(r"add\.rn\.f32\s+(\S+), (\S+), (\S+);", fused, text)


FAULTS: dict[str, Callable[[str], str]] = {
    "": lambda text: text,
    "another constant": another_constant,
    "no masks": no_masks,
    "flushes": flushes,
    "contracts": contracts,
}
