"""The CUDA backend: the kernels of the extension ``zo_fused._CUDA``, on NVIDIA GPUs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zo_fused.sweeps.backends import extension
from zo_fused.sweeps.backends.multi_tensor import MultiTensor
from zo_fused.sweeps.backends.table import Launch
from zo_fused.sweeps.numbers import FIRSTS, NUMBER, NUMBER_OF_DTYPE
from zo_fused.sweeps.numbers import TRANSFORMS as TRANSFORMS

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


def _stream(device: torch.device) -> int:
    """Handle of the current stream."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _first(launch: Launch) -> int:
    """What is kept of first moments, as a number of `FIRSTS`."""
    if not launch.state_dtypes:
        return 0
    return FIRSTS.index("float32" if launch.state_dtypes[0] == torch.float32 else "like_weights")


def _masked(launch: Launch) -> int:
    """Whether its weights have bits: 1, 0 for scales, -1 for nothing."""
    return int(launch.state_dtypes[0] == torch.uint8) if launch.state_dtypes else -1


# What an operator is told of a launch besides its table.
_ABOUT: dict[str, Callable[[Launch], tuple[int, ...]]] = {
    "bits": lambda launch: (),
    "normal": lambda launch: (),
    "dense": lambda launch: (NUMBER_OF_DTYPE[launch.dtype],),
    "shaped": lambda launch: (NUMBER_OF_DTYPE[launch.dtype], _masked(launch)),
    "moments": lambda launch: (NUMBER_OF_DTYPE[launch.dtype], _first(launch)),
    "lowrank": lambda launch: (NUMBER_OF_DTYPE[launch.dtype], launch.rank),
    "factor_momentum": lambda launch: (),
}


class CudaKernels:
    """The kernels, as `zo_fused.sweeps.backends.multi_tensor.Kernels`."""

    CHUNK: int
    TILE: tuple[int, int]

    def __init__(self, operators: Any) -> None:
        """operators: the namespace of ``torch.ops`` in which the extension registered them."""
        self.CHUNK, *tile = operators.sizes()
        self.TILE = (tile[0], tile[1])
        for name, about in _ABOUT.items():
            setattr(self, name, _kernel(getattr(operators, name), about))
        self._key = operators.key

    def chunk(self, elements: int, units: int) -> int:
        """One size: blocks take program after program."""
        return self.CHUNK

    def key(self, out: Tensor, counter: Tensor, *numbers: int) -> None:
        """See `zo_fused.sweeps.backends.multi_tensor`."""
        self._key(out, counter, *numbers, _stream(out.device))


def _kernel(operator: Any, about: Callable[[Launch], tuple[int, ...]]) -> Callable[..., None]:
    def run(launch: Launch, *rows: Any) -> None:
        numbers = [NUMBER[row] if isinstance(row, str) else row for row in rows]
        operator(
            launch.table, launch.programs, *about(launch), *numbers, _stream(launch.table.device)
        )

    return run


@functools.cache
def _kernels() -> CudaKernels:
    return CudaKernels(torch.ops.zo_fused_CUDA)


sweeps = MultiTensor(_kernels)
prepare = sweeps.prepare
globals().update(sweeps.functions)  # dense_ and the others
