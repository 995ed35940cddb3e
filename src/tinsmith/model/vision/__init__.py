"""How a model looks at pictures: what its image processor and its vision tower make of one, and what that means for
the rows of a pass."""

from tinsmith.model.vision.eyes import Eyes, UnseenError, open_eyes
from tinsmith.model.vision.kind import Sight, VisionKind
from tinsmith.model.vision.scene import Positions, Scene, joined, positions_of
from tinsmith.model.vision.sights import Sights, Span

__all__ = [
    "Eyes",
    "Positions",
    "Scene",
    "Sight",
    "Sights",
    "Span",
    "UnseenError",
    "VisionKind",
    "joined",
    "open_eyes",
    "positions_of",
]
