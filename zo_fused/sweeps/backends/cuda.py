"""The CUDA backend: the kernels of the extension ``zo_fused._CUDA``, on NVIDIA GPUs."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from zo_fused.sweeps.backends import extension
from zo_fused.sweeps.backends.multi_tensor import MultiTensor
from zo_fused.sweeps.backends.table import Launch

# Numbers of the enumerations in csrc/cuda/launch.h and csrc/element.h.
_DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
_RULES = {"momentum": 0, "sign": 1, "adam": 2}
TRANSFORMS = ("portable", "rademacher", "fast")
_NOTHING, _FLOAT32, _LIKE_WEIGHTS = range(3)

EXTENSION = "zo_fused._CUDA"
_BUILD = (
    "`ZO_FUSED_NATIVE=cuda pip install --force-reinstall --no-deps --no-cache-dir .` in a clean "
    "source tree, with nvcc on the PATH"
)

import_error = extension.load(EXTENSION)  # registers zo_fused_CUDA::*


def why_not(device_type: str) -> str | None:
    """None if this backend serves the device, else the reason."""
    if device_type != "cuda" or torch.version.hip is not None:
        return "the cuda backend serves tensors on NVIDIA GPUs"
    if import_error is not None:
        return extension.why_not("the CUDA extension", EXTENSION, import_error, _BUILD)
    if torch.cuda.is_available():
        here, oldest = torch.cuda.get_device_capability(), min(architectures())
        if here < oldest:
            return (
                f"the CUDA extension was built for GPUs from compute capability {oldest[0]}."
                f"{oldest[1]} on, this one has {here[0]}.{here[1]} (8.0 is possible)"
            )
    return None


def architectures() -> list[tuple[int, int]]:
    """Compute capabilities that the extension was compiled for; empty if it is not built."""
    numbers = [] if import_error else torch.ops.zo_fused_CUDA.architectures()
    return [(number // 100, number % 100 // 10) for number in numbers]


def _stream(launch: Launch) -> int:
    """Handle of the current stream."""
    device = launch.table.device
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


class Kernels:
    """The kernels, as `zo_fused.sweeps.backends.multi_tensor.Kernels`, which tells what each
    computes."""

    def __init__(self, operators: Any) -> None:
        """operators: the namespace of ``torch.ops`` in which the extension registered them."""
        self._operators = operators
        self.CHUNK, *tile = operators.sizes()
        self.TILE = (tile[0], tile[1])

    def bits(self, launch: Launch, keys: Tensor) -> None:
        self._operators.bits(launch.table, launch.programs, keys, _stream(launch))

    def normal(self, launch: Launch, keys: Tensor, transform: str) -> None:
        number = TRANSFORMS.index(transform)
        self._operators.normal(launch.table, launch.programs, keys, number, _stream(launch))

    def dense(
        self,
        launch: Launch,
        keys: Tensor,
        coeffs: Tensor,
        decay: Tensor,
        rounding: Tensor | None,
        transform: str,
    ) -> None:
        self._operators.dense(
            launch.table,
            launch.programs,
            _DTYPES[launch.dtype],
            keys,
            coeffs,
            decay,
            rounding,
            TRANSFORMS.index(transform),
            _stream(launch),
        )

    def moments(
        self,
        launch: Launch,
        keys: Tensor,
        grads: Tensor,
        restores: Tensor,
        coeffs: Tensor,
        decay: Tensor,
        rule: str,
        rounding: Tensor | None,
        transform: str,
        squares: Tensor | None,
    ) -> None:
        first = _NOTHING
        if launch.state_dtypes:
            first = _FLOAT32 if launch.state_dtypes[0] == torch.float32 else _LIKE_WEIGHTS
        self._operators.moments(
            launch.table,
            launch.programs,
            _DTYPES[launch.dtype],
            first,
            _RULES[rule],
            keys,
            grads,
            restores,
            squares,
            coeffs,
            decay,
            rounding,
            TRANSFORMS.index(transform),
            _stream(launch),
        )

    def lowrank(
        self, launch: Launch, coeffs: Tensor | None, decay: Tensor, rounding: Tensor | None
    ) -> None:
        self._operators.lowrank(
            launch.table,
            launch.programs,
            _DTYPES[launch.dtype],
            launch.rank,
            coeffs,
            decay,
            rounding,
            _stream(launch),
        )

    def momentum(self, launch: Launch, coeffs: Tensor) -> None:
        self._operators.momentum(launch.table, launch.programs, coeffs, _stream(launch))


@functools.cache
def _kernels() -> Kernels:
    return Kernels(torch.ops.zo_fused_CUDA)


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
