"""What textbooks in float64 and the runs that they check share: a model, its data, z."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zo_fused.noise import Purpose, derive_key, normal, parameter_id

Weights = dict[str, Tensor]
STEPS, SEED, EPS = 50, 11, 1e-2


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unsqueeze(1).chunk(3, dim=-1)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.squeeze(1))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class SmallTransformer(nn.Module):
    """Two blocks with tied embeddings."""

    def __init__(self, vocabulary: int = 31, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(
            self.head(x[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
        )


def model_and_tokens() -> tuple[SmallTransformer, Tensor]:
    torch.manual_seed(0)
    return SmallTransformer(), torch.randint(0, 31, (4, 12))


def dense(name: str, w: Tensor, step: int, query: int = 0) -> Tensor:
    key = derive_key(SEED, Purpose.DENSE, step, query)
    return normal(w.numel(), key, parameter_id(name)).double().view(w.shape)
