"""What textbooks in float64 and the runs that they check share: a model, its data, z, the run."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

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


@cache
def _drawn(name: str, size: int, *stream: int, transform: str = "portable") -> Tensor:
    """Most textbooks draw the same numbers, a parameter at a time, and most of their time went into
    that."""
    return normal(size, derive_key(SEED, *stream), parameter_id(name), transform=transform)


def drawn(
    name: str, shape: Sequence[int], purpose: int, step: int = 0, query: int = 0, **options: str
) -> Tensor:
    """The noise of a parameter from a stream, float64."""
    flat = _drawn(name, math.prod(shape), purpose, step, query, **options)
    return flat.double().view(*shape)


def dense(name: str, w: Tensor, step: int, query: int = 0) -> Tensor:
    return drawn(name, w.shape, Purpose.DENSE, step, query)


def rademacher(name: str, w: Tensor, step: int, query: int = 0) -> Tensor:
    return drawn(name, w.shape, Purpose.DENSE, step, query, transform="signs")


def float64_loss(model: nn.Module, tokens: Tensor) -> Loss:
    """The loss as a function of named weights, in float64: its rounding plays no part. It is the
    model's own forward pass, with its hooks."""

    def loss(weights: Weights) -> Tensor:
        doubles = {name: w.detach().double() for name, w in weights.items()}
        return functional_call(model, doubles, (tokens,))

    return loss


def loss_of_copy(model: nn.Module, tokens: Tensor) -> Loss:
    """The same of all weights, faster, for textbooks."""
    double = copy.deepcopy(model).double().requires_grad_(False)
    own = dict(double.named_parameters())

    def loss(weights: Weights) -> Tensor:
        assert weights.keys() == own.keys()
        for name, p in own.items():
            p.copy_(weights[name].detach())
        value: Tensor = double(tokens)
        return value

    return loss


def moved_by(theta: Weights, a: float, z: Weights) -> Weights:
    """``theta + a z``."""
    return {name: w + a * z[name] for name, w in theta.items()}


@dataclass(frozen=True)
class Followed:
    """A float32 run beside its textbook."""

    start: Weights
    end: Weights  # of the run
    theta: Weights  # of the textbook
    grads: Tensor  # what `projected_grad` was, steps and queries
    expected: Tensor

    @property
    def moved(self) -> float:
        """How far all weights went, in norm."""
        return _norm(self.theta, self.start)

    @property
    def distance(self) -> float:
        """Of all weights from the textbook's at the end, in norm."""
        return _norm(self.end, self.theta)

    @property
    def off(self) -> float:
        """The same of a weight, root mean square."""
        return self.distance / math.sqrt(sum(w.numel() for w in self.start.values()))

    @property
    def largest(self) -> tuple[float, float]:
        """How far one weight went, and how far one is off, at the most."""
        moved = max(float((self.theta[k] - w).abs().max()) for k, w in self.start.items())
        return moved, max(float((self.end[k] - w).abs().max()) for k, w in self.theta.items())


def _norm(one: Weights, other: Weights) -> float:
    return math.sqrt(sum(float((one[k] - w).square().sum()) for k, w in other.items()))


def follow(
    make: Callable[[nn.Module], ZerothOrderOptimizer],
    textbook: Callable[[Loss, Weights], list[float]],
    after: Callable[[ZerothOrderOptimizer, int], None] = lambda opt, step: None,
) -> Followed:
    """50 steps of an optimizer in float32 with losses in float64, and of a textbook, which moves
    the weights that it is given and returns what `projected_grad` should be.

    Args:
        after: is called after each step of the optimizer.
    """
    model, tokens = model_and_tokens()
    loss = float64_loss(model, tokens)
    theta = {name: p.detach().double() for name, p in model.named_parameters()}
    start = {name: w.clone() for name, w in theta.items()}
    expected = textbook(loss_of_copy(model, tokens), theta)
    opt = make(model)
    grads: list[float] = []
    for step in range(STEPS):
        opt.step(lambda: loss(dict(model.named_parameters())))
        assert opt.projected_grad is not None
        grads += opt.projected_grad.reshape(-1).tolist()
        after(opt, step)
    opt.flush()
    end = {name: p.detach().double() for name, p in model.named_parameters()}
    return Followed(start, end, theta, torch.tensor(grads), torch.tensor(expected))
