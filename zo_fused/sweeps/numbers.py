"""Enumerations, each in one place, in the order of their numbers.

C++ and Triton have copies: ``csrc/element.h``, ``csrc/cpu/sweeps.h``, ``csrc/cuda/launch.h`` and
the kernels. `tests/sweeps/test_numbers.py` compares them with these.
"""

from __future__ import annotations

import torch

WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TRANSFORMS = ("portable", "signs", "hadamard", "fast")
EXACT = ("portable", "signs", "hadamard")  # the same bits on every device; all that a CPU has
RULES = ("momentum", "sign", "adam", "hizoo")
FIRSTS = ("nothing", "float32", "like_weights")  # what is kept of first moments

NUMBER_OF_DTYPE = {dtype: number for number, dtype in enumerate(WEIGHT_DTYPES)}
# Of a transform or a rule; no word is both.
NUMBER = {word: number for words in (TRANSFORMS, RULES) for number, word in enumerate(words)}
