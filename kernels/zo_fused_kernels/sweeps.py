"""The kernels that `zo_fused.multi_tensor` launches. Floor 4."""

from .dense import dense
from .fill import bits, normal
from .launch import CHUNK, TILE
from .lowrank import lowrank, momentum
from .moments import moments

__all__ = ["CHUNK", "TILE", "bits", "dense", "lowrank", "moments", "momentum", "normal"]
