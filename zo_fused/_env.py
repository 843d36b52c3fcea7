"""The only reader of environment variables.

| variable             | meaning                                                              |
|----------------------|----------------------------------------------------------------------|
| ``ZO_FUSED_BACKEND`` | backend that serves every call; ``auto`` or unset: the best available |
| ``ZO_FUSED_ISA``     | instruction set of the C++ backend (read in ``csrc/cpu``):           |
|                      | ``avx512``, ``avx2`` or ``portable``; unset: the best of the CPU     |
| ``ZO_FUSED_NATIVE``  | what ``setup.py`` builds: ``auto``, ``cuda``, ``cpu`` or ``0``; for   |
|                      | CUDA it also reads ``CUDA_HOME`` and ``TORCH_CUDA_ARCH_LIST``         |
| ``TRITON_INTERPRET`` | Triton's own: ``1`` runs its kernels in Python, on CPU tensors        |
"""

from __future__ import annotations

import os


def forced_backend() -> str | None:
    """The backend named by ``ZO_FUSED_BACKEND``, or None for automatic choice."""
    name = os.environ.get("ZO_FUSED_BACKEND", "").strip().lower()
    return None if name in ("", "auto") else name


def triton_interprets() -> bool:
    """Whether Triton kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")
