"""The kernels that `zo_fused.sweeps.backends.multi_tensor` launches."""

from .dense import dense
from .fill import bits, normal
from .keys import key
from .launch import TILE, chunk
from .lowrank import factor_momentum, lowrank
from .moments import moments
from .shaped import shaped
from .steps import dense_steps

__all__ = [
    "TILE",
    "bits",
    "chunk",
    "dense",
    "dense_steps",
    "factor_momentum",
    "key",
    "lowrank",
    "moments",
    "normal",
    "shaped",
]
