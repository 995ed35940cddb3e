"""The vision of a model that has been opened: a picture goes in, what the model sees in it comes out.

Each distinct picture is processed and looked at by itself, so what is seen depends on nothing else in a pass; it is
kept as long as there is room, since the tower never changes. Not thread-safe.
Shape letters: N features of a picture, M rows of a pass that show one, D hidden size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np
import structlog
import torch
from torch import nn
from transformers import AutoImageProcessor, PreTrainedModel

from tinsmith import host_memory
from tinsmith.errors import TinsmithError, UserError
from tinsmith.model.peak import peak_bytes
from tinsmith.model.vision.kind import Pixels, Sight, VisionKind
from tinsmith.model.vision.scene import Scene, make_scene
from tinsmith.model.vision.sights import Sights, Span
from tinsmith.picture_files import read_rgb
from tinsmith.pictures import Picture, VisionInfo
from tinsmith.types import TokenArray

log = structlog.get_logger("tinsmith.worker")

DEFAULT_MAX_BYTES = 256 * 2**20


class UnseenError(UserError):
    """A picture of a pass can't be looked at. span: which of the pass's spans it is in."""

    def __init__(self, error: TinsmithError, span: int) -> None:
        super().__init__(error.message)
        self.code, self.category = error.code, error.category
        self.span = span


class TooLargeToSeeError(UserError):
    code = "out_of_memory"


class Eyes:
    """num_looks: how often a picture went through the tower. max_bytes: of what is kept of pictures; the last is kept
    whatever its size. row_bytes: of what one row shows. look_bytes: that the tower takes for each of them, meanwhile.
    """

    def __init__(self, info: VisionInfo, kind: VisionKind, model: nn.Module, processor: Any) -> None:
        self.info = info
        self.kind = kind
        self.num_looks = 0
        self.max_bytes = DEFAULT_MAX_BYTES
        self.num_bytes = 0
        self.row_bytes = 0.0
        self.look_bytes = 0.0
        self._model = model
        self._processor = processor
        self._kept: OrderedDict[bytes, Sight] = OrderedDict()
        self.device = next(model.parameters()).device

    def scene(self, tokens: TokenArray, pictures: Sequence[Picture]) -> Scene:
        """
        Raises:
            UserError: the pictures aren't where the tokens say, or have another number of tokens.
        """
        return make_scene(self.info, tokens, pictures, has_axes=self.kind.has_axes, sees_whole=self.kind.sees_whole)

    def sights(self, spans: Iterable[Span]) -> Sights | None:
        """What the rows of a pass show; None if they show no picture.

        Raises:
            UnseenError: a picture can't be read.
        """
        rows, features, deeper = [], [], []
        for number, span in enumerate(spans):
            for picture, first, stop, places in () if span.scene is None else span.scene.shown(span.start, span.end):
                try:
                    seen = self.see(picture)
                except UserError as error:
                    raise UnseenError(error, number) from None
                rows.append(places + span.row)
                features.append(seen.features_ND[first:stop])
                deeper.append([part[first:stop] for part in seen.deeper])
        if not rows:
            return None
        rows_M = torch.from_numpy(np.concatenate(rows)).to(self.device)
        return Sights(rows_M, torch.cat(features), tuple(torch.cat(parts) for parts in zip(*deeper, strict=True)))

    def see(self, picture: Picture) -> Sight:
        """
        Raises:
            UserError: it can't be read, or there is no memory for the tower to look at it.
        """
        key = picture.digest
        known = self._kept.get(key)
        if known is None:
            self._check_room(picture)
            known = self._kept[key] = self.look(self.pixels(picture))
            self.num_bytes += known.num_bytes
        self._kept.move_to_end(key)
        while self.num_bytes > self.max_bytes and len(self._kept) > 1:
            self.num_bytes -= self._kept.popitem(last=False)[1].num_bytes
        return known

    def look(self, pixels: Pixels) -> Sight:
        """Through the tower."""
        self.num_looks += 1
        with torch.inference_mode(False), torch.no_grad():  # what is kept serves passes with gradients too
            return self.kind.look(self._model, {name: value.to(self.device) for name, value in pixels.items()})

    def measure(self, picture: Picture) -> None:
        """Learn from one picture how much memory others will take."""
        pixels = self.pixels(picture)
        peak = peak_bytes(self.device, lambda: self.look(pixels))
        seen = self.look(pixels)
        self.row_bytes = seen.num_bytes / len(seen.features_ND)
        self.look_bytes = peak / len(seen.features_ND)

    @property
    def room_bytes(self) -> int:
        """What is kept of pictures may yet grow by so much."""
        return max(0, self.max_bytes - self.num_bytes)

    def _check_room(self, picture: Picture) -> None:
        needed = int(picture.num_tokens * self.look_bytes)
        if self.device.type == "cuda":
            cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            free: int | None = torch.cuda.mem_get_info(self.device)[0] + cached
        else:
            free = host_memory.available_bytes()
        if free is not None and needed > free:
            raise TooLargeToSeeError(
                f"there is not enough memory to look at a picture of {picture.width} x {picture.height} pixels (about "
                f"{needed >> 20:,} MiB needed, {free >> 20:,} MiB free): send a smaller one, or have the server given "
                "more memory"
            )

    def pixels(self, picture: Picture) -> Pixels:
        """What the model's own image processor makes of it, on the CPU."""
        upright = read_rgb(picture.data)
        if upright.size != (picture.width, picture.height):
            raise UserError(
                f"a picture of {upright.size[0]} x {upright.size[1]} pixels was announced as {picture.width} x "
                f"{picture.height}: send the size that the file has"
            )
        return cast(Pixels, self._processor(images=[upright], return_tensors="pt"))


def open_eyes(model: PreTrainedModel, info: VisionInfo | None, kind: VisionKind | None, path: str) -> Eyes | None:
    """The vision of a loaded model; None where it has none, or one that isn't known, which the log says."""
    if getattr(model.config, "vision_config", None) is None:
        return None
    if info is None or kind is None:
        log.warning(
            "pictures are refused: text alone goes through this model", model=type(model).__name__,
            because="its vision isn't of a known kind" if kind is None else "its directory lacks an image processor",
        )  # fmt: skip
        return None
    for tower in kind.towers:
        own = model.get_submodule(tower)
        if isinstance(own, PreTrainedModel):
            own.set_attn_implementation("sdpa")  # scores of all pairs of patches would take memory
    processor: Any = AutoImageProcessor
    processor = processor.from_pretrained(path, backend="pil", local_files_only=True, trust_remote_code=False)
    return Eyes(info, kind, model, processor)
