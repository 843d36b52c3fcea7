"""What textbooks in float64 and the runs that they check share: a model, its data, z, the run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from zo_fused.noise import Purpose, derive_key, normal, parameter_id
from zo_fused.step.optimizer import ZerothOrderOptimizer

Weights = dict[str, Tensor]
Loss = Callable[[Weights], Tensor]
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


def rademacher(name: str, w: Tensor, step: int, query: int = 0) -> Tensor:
    key = derive_key(SEED, Purpose.DENSE, step, query)
    return normal(w.numel(), key, parameter_id(name), transform="signs").double().view(w.shape)


def float64_loss(model: nn.Module, tokens: Tensor) -> Loss:
    """The loss as a function of named weights, in float64: its rounding plays no part."""

    def loss(weights: Weights) -> Tensor:
        doubles = {name: w.detach().double() for name, w in weights.items()}
        return functional_call(model, doubles, (tokens,))

    return loss


def moved_by(theta: Weights, a: float, z: Weights) -> Weights:
    """``theta + a z``."""
    return {name: w + a * z[name] for name, w in theta.items()}


class Followed(NamedTuple):
    """A float32 run beside its textbook."""

    off: float  # rms difference of a weight at the end
    moved: float  # how far all weights went, in norm
    grads: Tensor  # what `projected_grad` was, steps and queries
    expected: Tensor


def follow(
    make: Callable[[nn.Module], ZerothOrderOptimizer],
    textbook: Callable[[Loss, Weights], list[float]],
) -> Followed:
    """50 steps of an optimizer in float32 with losses in float64, and of a textbook, which moves
    the weights that it is given and returns what `projected_grad` should be."""
    model, tokens = model_and_tokens()
    loss = float64_loss(model, tokens)
    theta = {name: p.detach().double() for name, p in model.named_parameters()}
    start = {name: w.clone() for name, w in theta.items()}
    expected = textbook(loss, theta)
    opt = make(model)
    grads: list[float] = []
    for _ in range(STEPS):
        opt.step(lambda: loss(dict(model.named_parameters())))
        assert opt.projected_grad is not None
        grads += opt.projected_grad.reshape(-1).tolist()
    opt.flush()
    square = sum(float((p.detach() - theta[k]).square().sum()) for k, p in model.named_parameters())
    moved = math.sqrt(sum(float((theta[k] - w).square().sum()) for k, w in start.items()))
    elements = sum(w.numel() for w in start.values())
    off = math.sqrt(square / elements)
    return Followed(off, moved, torch.tensor(grads), torch.tensor(expected))
