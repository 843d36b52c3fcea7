"""Fused zeroth-order fine-tuning: forward passes only, inference memory, replayable noise.

Names load on first use (PEP 562): ``import zo_fused`` needs torch and NumPy alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what editors and type checkers see
    from zo_fused import noise as noise
    from zo_fused import ray as ray
    from zo_fused.methods.adam import ZOAdam as ZOAdam
    from zo_fused.methods.conmezo import ConMeZO as ConMeZO
    from zo_fused.methods.conservative import ZOConservative as ZOConservative
    from zo_fused.methods.es import ES as ES
    from zo_fused.methods.forward_grad import ForwardGrad as ForwardGrad
    from zo_fused.methods.fzoo import FZOO as FZOO
    from zo_fused.methods.hizoo import HiZOO as HiZOO
    from zo_fused.methods.hybrid import Hybrid as Hybrid
    from zo_fused.methods.kerzoo import KerZOO as KerZOO
    from zo_fused.methods.layers import first_layers as first_layers
    from zo_fused.methods.layers import layer_blocks as layer_blocks
    from zo_fused.methods.loren import LOREN as LOREN
    from zo_fused.methods.lozo import LOZO as LOZO
    from zo_fused.methods.meazo import MEAZO as MEAZO
    from zo_fused.methods.mezo import MeZO as MeZO
    from zo_fused.methods.pgap import PGAP as PGAP
    from zo_fused.methods.qzo import QZO as QZO
    from zo_fused.methods.scales import quantization_scales as quantization_scales
    from zo_fused.methods.seezo import SeeZO as SeeZO
    from zo_fused.methods.sign import ZOSignSGD as ZOSignSGD
    from zo_fused.methods.sparse_mezo import SparseMeZO as SparseMeZO
    from zo_fused.methods.subzero import SubZero as SubZero
    from zo_fused.methods.tezo import TeZO as TeZO
    from zo_fused.methods.zo_muon import ZOMuon as ZOMuon
    from zo_fused.parallel.options import Parallel as Parallel
    from zo_fused.replaying.rebuild import replay as replay
    from zo_fused.sweeps.dispatch import backend_of as backend_of
    from zo_fused.sweeps.dispatch import set_backend as set_backend
    from zo_fused.sweeps.functions import moments_update_ as moments_update_
    from zo_fused.sweeps.functions import perturb_ as perturb_
    from zo_fused.sweeps.functions import update_ as update_
    from zo_fused.sweeps.low_rank_functions import lowrank_momentum_ as lowrank_momentum_
    from zo_fused.sweeps.low_rank_functions import lowrank_perturb_ as lowrank_perturb_
    from zo_fused.sweeps.low_rank_functions import lowrank_update_ as lowrank_update_
    from zo_fused.sweeps.shards import Shard as Shard

__version__ = "0.1.0.dev0"

# Methods are found by their names in the table that their files fill.
_HOME = {
    "Hybrid": "zo_fused.methods.hybrid",
    "Parallel": "zo_fused.parallel.options",
    "Shard": "zo_fused.sweeps.shards",
    "backend_of": "zo_fused.sweeps.dispatch",
    "first_layers": "zo_fused.methods.layers",
    "layer_blocks": "zo_fused.methods.layers",
    "lowrank_momentum_": "zo_fused.sweeps.low_rank_functions",
    "lowrank_perturb_": "zo_fused.sweeps.low_rank_functions",
    "lowrank_update_": "zo_fused.sweeps.low_rank_functions",
    "moments_update_": "zo_fused.sweeps.functions",
    "perturb_": "zo_fused.sweeps.functions",
    "quantization_scales": "zo_fused.methods.scales",
    "replay": "zo_fused.replaying.rebuild",
    "set_backend": "zo_fused.sweeps.dispatch",
    "update_": "zo_fused.sweeps.functions",
}
_MODULES = ("noise", "ray")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"zo_fused.{name}")
    if name == "__all__":
        return ["__version__", *_HOME, *_MODULES, *_methods()]
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    elif name.startswith("_") or name not in _methods():
        raise AttributeError(f"module 'zo_fused' has no attribute {name!r}")
    else:
        value = _methods()[name]
    globals()[name] = value
    return value


def _methods() -> Any:
    return importlib.import_module("zo_fused.methods.table").methods()


def __dir__() -> list[str]:
    return sorted(__getattr__("__all__"))
