"""Options of ``zo-fused finetune`` that belong to methods. Defaults are those of the methods."""

from __future__ import annotations

from functools import cache
from typing import Any

from zo_fused.cli.parser import choice, default_text, whole

QUANTIZERS = ("int8",)  # keys of `zo_fused.task.models.QUANTIZERS`

# Arguments of the methods; two names that stand for several, schedule and blocks; and quantize,
# what a method needs of the model. In a help text {default} stands for the default, and {methods}
# for the methods that take the option.
OPTIONS: dict[str, dict[str, Any]] = {
    "lr": {"type": float, "help": "learning rate ({default})"},
    "eps": {"type": float, "help": "perturbation radius ({default})"},
    "queries": {"type": whole, "help": "random directions a step, averaged ({default})"},
    "one_sided": {
        "action": "store_true",
        "default": None,
        "help": "estimate from theta + eps z and theta instead of theta +- eps z",
    },
    "distribution": {
        **choice(("gaussian", "hadamard", "rademacher")),
        "help": "{methods}: of z, or U and V ({default})",
    },
    "prior": {
        **choice(("guiding", "greedy", "survivor")),
        "help": "{methods}: make z of candidates whose losses are taken first, the better half "
        "minus the worse, the best, or the better of a new one and the last step's minus the worse "
        "(default: none, with mezo-gv guiding, with mezo-greedy greedy)",
    },
    "pool": {
        "type": whole,
        "help": "{methods}: candidates with --prior, a forward pass each (default: 4, with "
        "survivor 2)",
    },
    "rank": {"type": whole, "help": "{methods}: columns of U and V ({default})"},
    "interval": {
        "type": whole,
        "help": "{methods}: steps for which V, or a mask, stays ({default})",
    },
    "population": {"type": whole, "help": "{methods}: members of a step ({default})"},
    "shaping": {
        **choice(("zscore", "centered_rank", "none")),
        "help": "{methods}: what is made of rewards ({default})",
    },
    "antithetic": {
        "action": "store_true",
        "default": None,
        "help": "{methods}: members in pairs, at theta + eps z and theta - eps z",
    },
    "direction": {
        **choice(("dense", "lowrank")),
        "help": "{methods}: z of independent elements, or of low rank ({default})",
    },
    "basis": {
        **choice(("random", "activations")),
        "help": "{methods}: V at random, or the main directions of what linear layers are given "
        "({default})",
    },
    "refresh": {
        "metavar": "STEPS",
        "type": whole,
        "help": "{methods}: with --basis activations, look at activations again every so many "
        "steps, which takes a forward pass and the place of --interval (default: once; agzo: 50)",
    },
    "others": {
        **choice(("random", "frozen")),
        "help": "{methods}: with --basis activations, what is no matrix of a linear layer alone "
        "({default})",
    },
    "moments": {
        **choice(("adam",)),
        "help": "{methods}: Adam on the estimate in the factor or core (default: none, with "
        "zo-act, subzero-adam and tezo-adam adam)",
    },
    "momentum": {"type": float, "help": "{methods}: in [0, 1) (default: 0, with -m 0.9)"},
    "history": {
        "metavar": "STEPS",
        "type": whole,
        "help": "{methods}: keep no moments, make them anew from so many last steps",
    },
    "blocks": {
        **choice(("sequential", "simultaneous")),
        "help": "perturb layer by layer: one block of the model a step, in turn, or every block in "
        "each step, two forward passes a block; takes the schedule plain",
    },
    "quantize": {
        **choice(QUANTIZERS),
        "help": "{methods}: quantize the model's linear layers, with torchao (default: a model of "
        "your own must be quantized already)",
    },
    "weight_decay": {"type": float, "help": "({default})"},
    "rounding": {
        **choice(("nearest", "stochastic")),
        "help": "of updates in 16-bit weights (default: stochastic where the schedule is factored "
        "or paired and with forward-grad, else nearest)",
    },
    "schedule": {
        **choice(("plain", "deferred", "factored", "paired")),
        "help": "sweeps over the weights a step: 3, 2, or (low rank) one a window; paired: the "
        "same, with both signs in one forward pass, for batches of few tokens (default: factored "
        "for methods of low rank but tezo-adam, deferred for it and the others that have it)",
    },
}


@cache
def by_method() -> dict[str, dict[str, Any]]:
    """The options that each method takes, with its defaults, by name."""
    from zo_fused.methods.table import arguments, recipes

    table = {}
    for name, (method, recipe) in recipes().items():
        takes = arguments(method)
        own = {option: takes[option] for option in OPTIONS if option in takes}
        own["schedule"] = recipe.schedule or (
            "factored" if "mode" in takes else "deferred" if "deferred" in takes else "plain"
        )
        if "block_order" in takes:
            own["blocks"] = None
        if method.quantized:
            own["quantize"] = None
        table[name] = own | recipe.options
    return table


def add_method_options(parser: Any) -> None:
    """Adds all of them."""
    for name, option in OPTIONS.items():
        takers = {method: table[name] for method, table in by_method().items() if name in table}
        told = {"default": default_text(takers.values()), "methods": ", ".join(takers)}
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, **{**option, "help": option["help"].format(**told)})
