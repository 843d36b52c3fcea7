"""Whether a CUDA graph is being recorded.

What is recorded runs later, and again and again: it must copy nothing from the host, and the memory
that it reads must stay.
"""

from __future__ import annotations

import torch


def capturing() -> bool:
    """Whether a CUDA graph is being recorded on the current stream."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
