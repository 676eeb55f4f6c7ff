"""Adam on a small vector, its state in buffers: for balancings that learn without autograd."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

DECAY, SQUARE_DECAY, EPSILON = 0.9, 0.999, 1e-8


class VectorAdam(nn.Module):
    """Adam (1412.6980) with its usual constants: m and v are running means of g and g^2, and the step is

        learning_rate * m^ / (sqrt(v^) + 1e-8),    m^ = m / (1 - 0.9^n),    v^ = v / (1 - 0.999^n).

    Differs: an entry that takes no part in an update keeps its m, v and n, each entry has an n of its own.
    """

    mean: Tensor
    square: Tensor
    updates: Tensor

    def __init__(self, size: int, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        for name in ("mean", "square", "updates"):
            self.register_buffer(name, torch.zeros(size, dtype=torch.float64))

    @torch.no_grad()
    def step(self, gradient: Float[Tensor, " k"], counts: Bool[Tensor, " k"]) -> Float[Tensor, " k"]:
        """What to subtract from the vector: 0 for the entries that do not count, whatever their gradient."""
        gradient = torch.where(counts, gradient, 0)
        self.updates += counts
        self.mean.copy_(torch.where(counts, torch.lerp(self.mean, gradient, 1 - DECAY), self.mean))
        square = SQUARE_DECAY * self.square + (1 - SQUARE_DECAY) * gradient.square()
        self.square.copy_(torch.where(counts, square, self.square))
        n = self.updates.clamp(min=1)
        mean, spread = self.mean / (1 - DECAY**n), (self.square / (1 - SQUARE_DECAY**n)).sqrt()
        return torch.where(counts, self.learning_rate * mean / (spread + EPSILON), 0)
