"""The reference backend: `zo_fused.sweeps.reference` on any device, in bounded scratch memory."""

from zo_fused.sweeps.reference import (
    TRANSFORMS,
    bits_,
    dense_,
    dense_steps_,
    lowrank_,
    lowrank_momentum_,
    lowrank_steps_,
    moments_,
    normal_,
)

__all__ = [
    "TRANSFORMS",
    "bits_",
    "dense_",
    "dense_steps_",
    "lowrank_",
    "lowrank_momentum_",
    "lowrank_steps_",
    "moments_",
    "normal_",
    "why_not",
]


def why_not(device_type: str) -> str | None:
    """None: the reference serves every device (float64 arithmetic included)."""
    if device_type in ("mps", "meta"):
        return f"the reference needs float64 arithmetic, which {device_type!r} tensors lack"
    return None
