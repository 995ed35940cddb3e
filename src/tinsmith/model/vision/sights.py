"""What the rows of one pass show in the place of their tokens' embeddings.

Shape letters: M rows of the pass that show a picture, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tinsmith.model.vision.kind import Sight
from tinsmith.model.vision.scene import Scene
from tinsmith.model.vision.tower import Lens


@dataclass(frozen=True, slots=True)
class Span:
    """Places start..end-1 of a sequence are the rows of a pass from `row` on.

    lens: through which its pictures are looked at. seen: of all its pictures, end to end, where they were looked at
    already.
    """

    scene: Scene | None
    start: int
    end: int
    row: int
    lens: Lens | None = None
    seen: Sight | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Sights:
    """rows_M: int64, ascending. features_MD: their embeddings. deeper: [M, D] each, added after the first layers."""

    rows_M: Tensor
    features_MD: Tensor
    deeper: tuple[Tensor, ...]
