"""A model's layers: its parameters block by block, or in two parts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from zo_fused.noise.streams import plain_name

Named = list[tuple[str, nn.Parameter]]

_GIVE_PATTERNS = (
    "give patterns: layer_blocks(model, [r'embed', r'layers\\.0\\.', ..., r'']), one regular "
    "expression a block, on the names of parameters"
)

# OPT declares these before its layers but runs them after.
_RUNS_LAST = re.compile(r"(^|\.)(final_|project_out\b)")


def layer_blocks(model: nn.Module, patterns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Param groups for block-wise optimization, in the order of the forward pass.

    Without patterns: what comes before the layers (embeddings), one block a layer, what comes after
    (final norm, head). The layers are the items of an `nn.ModuleList` or `nn.Sequential` of modules
    of one class: the longest such list that is not inside a layer of another (the experts of a
    layer are no layers). What comes before is what `model.named_parameters()` has before the first
    layer, but for OPT's final norm and projection.

    Args:
        model: whose parameters to group, all of them, whether or not they require gradients (the
            optimizers look at that in every step).
        patterns: regular expressions; a parameter goes to the block of the first that
            `re.search` finds in its name, which is that of the plain model where this one is
            compiled or wrapped.

    Returns:
        Groups ``{"params": [(name, parameter), ...], "block": i}``, i = 0, 1, ...; blocks without a
        parameter are left out. Tied parameters are in the block where they appear first.

    Raises:
        ValueError: a parameter matches no pattern; or, without patterns, no list of layers was
            found, or several of the same length (encoder and decoder).
    """
    if patterns is None:
        before, layers, after = _split(model)
        blocks = [before, *layers, after]
    else:
        blocks = [[] for _ in patterns]
        for name, p in model.named_parameters():
            matching = (i for i, text in enumerate(patterns) if re.search(text, plain_name(name)))
            block = next(matching, None)
            if block is None:
                raise ValueError(f"no pattern matches parameter {name!r}; a last pattern '' would")
            blocks[block].append((name, p))
    return [{"params": named, "block": i} for i, named in enumerate(filter(None, blocks))]


def first_layers(model: nn.Module, k: int) -> tuple[Named, Named]:
    """The parameters up to the first k layers, embeddings included, and the rest.

    Tied parameters belong to the part where they appear first: OPT's head, tied to the embedding,
    to the first. Layers are found as in `layer_blocks`.

    Raises:
        ValueError: k is not in [0, number of layers], or the layers were not found.
    """
    before, layers, after = _split(model)
    if not 0 <= k <= len(layers):
        raise ValueError(f"k must lie in [0, {len(layers)}], the number of layers, got {k}")
    first = [*before, *(named for layer in layers[:k] for named in layer)]
    rest = [*(named for layer in layers[k:] for named in layer), *after]
    return first, rest


def _split(model: nn.Module) -> tuple[Named, list[Named], Named]:
    """Parameters before the layers, of each layer, and after them."""
    prefix, children = _layer_list(model)
    before: Named = []
    layers: list[Named] = [[] for _ in children]
    after: Named = []
    for name, p in model.named_parameters():
        if name.startswith(prefix):
            number = name.removeprefix(prefix).split(".")[0]
            layers[children.index(number)].append((name, p))
        elif any(layers) or _RUNS_LAST.search(name):
            after.append((name, p))
        else:
            before.append((name, p))
    return before, layers, after


def _layer_list(model: nn.Module) -> tuple[str, list[str]]:
    """Prefix of the names of the layers' parameters ("model.layers."), and the layers' names."""
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or not len(module):
            continue
        alike = len({type(layer) for layer in module}) == 1
        inside = any(len(names) > 1 and name.startswith(outer) for outer, names in found.items())
        if alike and not inside and all(any(True for _ in m.parameters()) for m in module):
            found[f"{name}." if name else ""] = list(module._modules)
    if not found:
        raise ValueError(f"no list of layers was found in {type(model).__name__}; {_GIVE_PATTERNS}")
    most = max(map(len, found.values()))
    longest = [prefix for prefix, names in found.items() if len(names) == most]
    if len(longest) > 1:
        names = ", ".join(prefix.removesuffix(".") for prefix in longest)
        raise ValueError(f"several lists of {most} layers were found ({names}); {_GIVE_PATTERNS}")
    return longest[0], found[longest[0]]
