"""The kernels that `zo_fused.sweeps.backends.multi_tensor` launches."""

from .dense import dense
from .fill import bits, normal
from .keys import key
from .launch import CHUNK, TILE
from .lowrank import factor_momentum, lowrank
from .moments import moments
from .steps import dense_steps

__all__ = [
    "CHUNK",
    "TILE",
    "bits",
    "dense",
    "dense_steps",
    "factor_momentum",
    "key",
    "lowrank",
    "moments",
    "normal",
]
