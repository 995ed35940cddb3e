"""How a model looks at pictures: what its image processor and its vision tower make of one, and what that means for
the rows of a pass."""

from tinsmith.model.vision.eyes import Eyes, UnseenError, in_looks, open_eyes
from tinsmith.model.vision.kind import Sight, VisionKind
from tinsmith.model.vision.scene import Positions, Scene, joined, positions_of
from tinsmith.model.vision.sights import Sights, Span
from tinsmith.model.vision.tower import Lens, Shares

__all__ = [
    "Eyes",
    "Lens",
    "Positions",
    "Scene",
    "Shares",
    "Sight",
    "Sights",
    "Span",
    "UnseenError",
    "VisionKind",
    "in_looks",
    "joined",
    "open_eyes",
    "positions_of",
]
