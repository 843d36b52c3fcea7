"""The Triton backend: NVIDIA and AMD GPUs or, for tests, Triton's interpreter."""

from __future__ import annotations

import importlib
import re
from importlib.metadata import PackageNotFoundError, requires

import torch

from zo_fused.sweeps.backends.multi_tensor import Kernels, MultiTensor
from zo_fused.sweeps.numbers import TRANSFORMS as TRANSFORMS

# The Triton that a minor version of PyTorch requires. zo_fused is tested with all of them.
PAIRS = {"2.11": "3.6.0", "2.12": "3.7.1", "2.13": "3.7.1", "2.14": "3.8.0", "2.15": "3.9.0"}


# ---- versions -----------------------------------------------------------------------------------


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _own_word() -> str | None:
    """The Triton that the installed build of PyTorch requires; None: builds for CPUs require none,
    those for AMD and Intel another package."""
    try:
        requirements = requires("torch") or []
    except PackageNotFoundError:
        return None
    found = [re.match(r"triton\s*==\s*([\d.]+)", line) for line in requirements]
    return next((match[1] for match in found if match), None)


def fitting() -> str | None:
    """The Triton that goes with the installed PyTorch, as far as known."""
    return _own_word() or PAIRS.get(".".join(map(str, _minor(torch.__version__))))


def _install() -> str:
    """The command that brings a Triton that fits."""
    version = fitting()
    return f"`pip install triton=={version}`" if version else "`pip install 'zo-fused[triton]'`"


def doubt() -> str | None:
    """What may go wrong with the installed versions although the backend serves, if anything."""
    import triton

    version = _minor(triton.__version__)
    tested = sorted({_minor(pair) for pair in PAIRS.values()})
    if version not in tested:
        known = ", ".join(".".join(map(str, pair)) for pair in tested)
        return (
            f"zo_fused was not tested with Triton {triton.__version__}, only with {known}; "
            f"should anything look wrong: {_install()}"
        )
    wanted = _own_word()
    if wanted is not None and _minor(wanted) != version:
        return (
            f"PyTorch {torch.__version__} requires Triton {wanted}, and {triton.__version__} is "
            f"installed; zo_fused works with both, torch.compile may not: {_install()}"
        )
    return None


def interpreter_fails() -> str | None:
    """Why kernels can't run, where they are interpreted and the installed versions don't fit."""
    import numpy
    import triton
    from zo_fused_kernels.launch import INTERPRETING

    unfit = _minor(triton.__version__) < (3, 7) and _minor(numpy.__version__) >= (2, 4)
    if INTERPRETING.value and unfit:
        return (
            f"the interpreter of Triton {triton.__version__} fails with NumPy {numpy.__version__}; "
            "it takes NumPy below 2.4, or Triton 3.7"
        )
    return None


# ---- the backend --------------------------------------------------------------------------------


def why_not(device_type: str) -> str | None:
    """None if this backend serves the device, else the reason."""
    try:
        import triton
    except ImportError as error:
        return f"Triton can't be imported ({error}); {_install()}"
    oldest = min(PAIRS.values(), key=_minor)
    if _minor(triton.__version__) < _minor(oldest):
        return f"Triton {triton.__version__} is too old, {oldest} or newer works; {_install()}"

    from zo_fused_kernels.launch import INTERPRETING

    if INTERPRETING.value and device_type in ("cpu", "cuda"):
        return interpreter_fails()
    if device_type == "cuda":
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
globals().update(sweeps.functions)  # dense_ and the others
