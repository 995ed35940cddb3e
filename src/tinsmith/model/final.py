"""What becomes of logits between the output head and the softmax: a factor, and a cap (Gemma 2, arXiv 2408.00118)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class FinalLogits:
    """z = cap · tanh(factor · y / cap) of the head's outputs y; without a cap factor · y."""

    factor: float = 1.0
    cap: float | None = None

    def apply_(self, logits: Tensor) -> Tensor:
        """In place."""
        if self.factor != 1.0:
            logits.mul_(self.factor)
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def bend(self, logits: Tensor) -> Tensor | None:
        """1 - (z / cap)² at these z, a new tensor; None without a cap."""
        return None if self.cap is None else (logits / self.cap).square_().neg_().add_(1.0)

    def chain_(self, grad: Tensor, bend: Tensor | None) -> Tensor:
        """From the gradient by z to that by y, in place, with dz/dy = factor · (1 - (z / cap)²)."""
        if bend is not None:
            grad.mul_(bend)
        return grad if self.factor == 1.0 else grad.mul_(self.factor)
