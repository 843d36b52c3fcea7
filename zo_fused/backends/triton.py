"""The Triton backend: NVIDIA and AMD GPUs or, for tests, Triton's interpreter. Floor 3."""

from __future__ import annotations

import importlib

from zo_fused.multi_tensor import Kernels, MultiTensor

OLDEST = (3, 6)
TRANSFORMS = ("portable", "rademacher", "fast")


def why_not(device_type: str) -> str | None:
    """None if this backend serves the device, else the reason."""
    try:
        import triton
    except ImportError as error:
        return f"Triton can't be imported ({error}); `pip install 'zo-fused[triton]'`"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST:
        return f"Triton {triton.__version__} is too old; upgrade it to {OLDEST[0]}.{OLDEST[1]}"

    from zo_fused_kernels.launch import INTERPRETING

    if device_type == "cuda" or (INTERPRETING.value and device_type == "cpu"):
        return None
    return (
        f"Triton compiles for GPUs, not for {device_type!r} tensors; to run its kernels in Python "
        "on CPU tensors, slowly, set TRITON_INTERPRET=1 before starting"
    )


def _kernels() -> Kernels:
    # Imported late: defining kernels needs Triton, and decides whether they are interpreted.
    return importlib.import_module("zo_fused_kernels.sweeps")


sweeps = MultiTensor(_kernels)
prepare = sweeps.prepare
bits_ = sweeps.bits_
normal_ = sweeps.normal_
dense_ = sweeps.dense_
dense_steps_ = sweeps.dense_steps_
moments_ = sweeps.moments_
lowrank_ = sweeps.lowrank_
lowrank_steps_ = sweeps.lowrank_steps_
lowrank_momentum_ = sweeps.lowrank_momentum_
