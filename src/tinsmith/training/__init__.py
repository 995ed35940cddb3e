"""Training of many runs in shared passes: packing, attention, losses, gradients, optimizer."""

from tinsmith.training.trainer import Trainer

__all__ = ["Trainer"]
