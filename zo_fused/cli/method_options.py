"""Options of ``zo-fused finetune`` that belong to methods. Defaults are those of the methods."""

from __future__ import annotations

from functools import cache
from typing import Any

from zo_fused.cli.parser import choice, pair, truth, whole

QUANTIZERS = ("int8",)  # keys of `zo_fused.task.models.QUANTIZERS`

# Arguments of the methods; two names that stand for several, schedule and blocks; and quantize,
# what a method needs of the model. `zo_fused.cli.method_help` adds to a help text who takes the
# option and its default; UNSET says what a default of None is.
OPTIONS: dict[str, dict[str, Any]] = {
    "lr": {"type": float, "help": "learning rate"},
    "eps": {"type": float, "help": "perturbation radius"},
    "queries": {"type": whole, "help": "random directions a step, averaged"},
    "one_sided": {
        "action": "store_true",
        "default": None,
        "help": "estimate from theta + eps z and theta instead of theta +- eps z",
    },
    "distribution": {
        **choice(("gaussian", "hadamard", "rademacher")),
        "help": "of z, or U and V",
    },
    "prior": {
        **choice(("guiding", "greedy", "survivor")),
        "help": "make z of candidates whose losses are taken first, the better half "
        "minus the worse, the best, or the better of a new one and the last step's minus the worse",
    },
    "pool": {
        "type": whole,
        "help": "candidates with --prior, a forward pass each",
    },
    "rank": {"type": whole, "help": "columns of U and V"},
    "divide_by_rank": {
        "action": "store_true",
        "default": None,
        "help": "the update over the rank, as in the paper",
    },
    "scale": {
        "metavar": "{yes,no}",
        "type": truth,
        "help": "elements of z of variance 1, so that eps and lr are of MeZO's size",
    },
    "interval": {
        "type": whole,
        "help": "steps for which V, a mask or a space stays",
    },
    "population": {"type": whole, "help": "members of a step"},
    "shaping": {
        **choice(("zscore", "centered_rank", "none")),
        "help": "what is made of rewards",
    },
    "antithetic": {
        "action": "store_true",
        "default": None,
        "help": "members in pairs, at theta + eps z and theta - eps z",
    },
    "direction": {
        **choice(("dense", "lowrank")),
        "help": "z of independent elements, or of low rank",
    },
    "basis": {
        **choice(("random", "activations")),
        "help": "V at random, or the main directions of what linear layers are given",
    },
    "refresh": {
        "metavar": "STEPS",
        "type": whole,
        "help": "where V is of activations, look at them again every so many steps, which takes a "
        "forward pass and the place of --interval",
    },
    "others": {
        **choice(("random", "frozen")),
        "help": "where V is of activations, what is no matrix of a linear layer alone",
    },
    "moments": {
        **choice(("adam",)),
        "help": "Adam on the estimate in the factor or core",
    },
    "betas": {
        "metavar": "BETA1/BETA2",
        "type": pair,
        "help": "decay of Adam's moments, each in [0, 1)",
    },
    "adam_eps": {"type": float, "help": "added to the root of Adam's second moment"},
    "momentum": {"type": float, "help": "in [0, 1)"},
    "dampening": {"type": float, "help": "of the momentum, in [0, 1)"},
    "warmup": {
        "metavar": "STEPS",
        "type": int,
        "help": "in which the momentum rises from 0.1",
    },
    "state_dtype": {
        **choice(("float32", "param")),
        "help": "of the moments; param: that of each weight",
    },
    "beta": {"type": float, "help": "decay of the second moment, in [0, 1)"},
    "zeta": {"type": float, "help": "added to the root of the second moment"},
    "history": {
        "metavar": "STEPS",
        "type": whole,
        "help": "keep no moments, make them anew from so many last steps",
    },
    "blocks": {
        **choice(("sequential", "simultaneous")),
        "help": "perturb layer by layer: one block of the model a step, in turn, or every block in "
        "each step, two forward passes a block; takes the schedule plain",
    },
    "quantize": {
        **choice(QUANTIZERS),
        "help": "quantize the model's linear layers, with torchao",
    },
    "hessian_smooth": {"type": float, "help": "of a new H in the old one, in [0, 1)"},
    "probes": {"type": whole, "help": "directions that estimate the gradient at a window's start"},
    "probes_one_sided": {
        "action": "store_true",
        "default": None,
        "help": "take the loss at theta once instead of a second side of every probe",
    },
    "delta": {
        "metavar": "FIRST/LAST",
        "type": pair,
        "help": "alignment with the estimated gradient, in the first step and the last",
    },
    "align": {
        **choice(("matrix", "shared", "joint")),
        "help": "each matrix on its own, with one sign for all, or all matrices as one",
    },
    "vector_lr": {"type": float, "help": "learning rate of one-dimensional parameters"},
    "vector_eps": {"type": float, "help": "perturbation radius of one-dimensional parameters"},
    "share": {"type": float, "help": "of the weights of a tensor that the mask lets move"},
    "mask": {**choice(("magnitude", "random")), "help": "which weights move: the smallest, or any"},
    "kernel": {**choice(("linear", "cubic", "quintic")), "help": "weights of estimates"},
    "lr_cov": {"type": float, "help": "learning rate of the curvature"},
    "rho": {"type": float, "help": "damping of the curvature, above 0"},
    "theta": {"type": float, "help": "angle between z and the momentum, in radians"},
    "clip": {"type": float, "help": "largest projected gradient"},
    "floor": {"type": float, "help": "smallest value of a scale"},
    "weight_decay": {"type": float, "help": "decay, times the learning rate"},
    "rounding": {
        **choice(("nearest", "stochastic")),
        "help": "of updates in 16-bit weights",
    },
    "schedule": {
        **choice(("plain", "deferred", "factored", "paired")),
        "help": "sweeps over the weights a step: 3, 2, or (low rank) one a window; paired: the "
        "same, with both signs in one forward pass, for batches of few tokens",
    },
}

UNSET = {
    "prior": "none",
    "pool": "4, with survivor 2",
    "interval": "the whole run",
    "refresh": "once",
    "moments": "none",
    "history": "none",
    "delta": "none",
    "vector_lr": "as --lr",
    "vector_eps": "as --eps",
    "blocks": "none",
    "quantize": "a model of your own must be quantized already",
    "rounding": "stochastic where the schedule is factored or paired, else nearest",
}


@cache
def by_method() -> dict[str, dict[str, Any]]:
    """The options that each method takes, with its defaults, by name."""
    from zo_fused.methods.table import arguments, recipes

    table = {}
    for name, (method, recipe) in recipes().items():
        takes = arguments(method)
        own = {option: takes[option] for option in OPTIONS if option in takes}
        own["schedule"] = recipe.schedule or ("factored" if "mode" in takes else in_place(name))
        if "block_order" in takes:
            own["blocks"] = None
        if method.quantized:
            own["quantize"] = None
        table[name] = own | recipe.options
    return table


def in_place(name: str) -> str:
    """The schedule of a method where nothing is kept beside the weights."""
    from zo_fused.methods.table import arguments, recipes

    return "deferred" if "deferred" in arguments(recipes()[name][0]) else "plain"
