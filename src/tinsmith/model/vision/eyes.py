"""The vision of a model that has been opened: a picture goes in, what the model sees in it comes out.

Each distinct picture is processed and looked at by itself, so what is seen depends on nothing else in a pass; it is
kept as long as there is room, since the tower never changes. Through adapters of the tower many pictures are looked at
together, each through its own, in deterministic mode one by one; what is seen through frozen ones is kept too.
Not thread-safe.
Shape letters: N features of a picture, M rows of a pass that show one, D hidden size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import numpy as np
import structlog
import torch
from torch import nn
from transformers import AutoImageProcessor, PreTrainedModel

from tinsmith.errors import TinsmithError, UserError
from tinsmith.model.context import LinearContext
from tinsmith.model.device import free_bytes
from tinsmith.model.inspect import LinearInfo
from tinsmith.model.linear import LinearGroup
from tinsmith.model.lora import LoopLora, LoraBackend
from tinsmith.model.peak import peak_bytes
from tinsmith.model.vision.kind import Pixels, Sight, VisionKind
from tinsmith.model.vision.scene import Scene, make_scene
from tinsmith.model.vision.sights import Sights, Span
from tinsmith.model.vision.tower import (
    Lens,
    Lenses,
    NoLens,
    Rehearsal,
    Shares,
    TowerHolder,
    check_looked_through,
    open_tower,
)
from tinsmith.pictures import Picture, VisionInfo, placeholders
from tinsmith.types import IntArray, TokenArray
from tinsmith.validate.picture_files import read_rgb

log = structlog.get_logger("tinsmith.worker")

DEFAULT_MAX_BYTES = 256 * 2**20
TOGETHER = 2048  # features of pictures that are looked at together: more at once is no faster
PROBE_RANK = 32


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
    looks_alone: through adapters too, nothing of another request is looked at meanwhile. lora: how these are computed.
    """

    def __init__(
        self,
        info: VisionInfo,
        kind: VisionKind,
        model: nn.Module,
        processor: Any,
        *,
        looks_alone: bool = False,
    ) -> None:
        self.info = info
        self.kind = kind
        self.looks_alone = looks_alone
        self.holder = TowerHolder()
        self.lora: LoraBackend = LoopLora
        self._grad_bytes: float | None = None
        self._sample: Picture | None = None
        self.num_looks = 0
        self.max_bytes = DEFAULT_MAX_BYTES
        self.num_bytes = 0
        self.row_bytes = 0.0
        self.look_bytes = 0.0
        self._model = model
        self._groups: list[LinearGroup] = []
        self._processor = processor
        self._kept: OrderedDict[tuple[bytes, int | None], Sight] = OrderedDict()
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
        spans = list(spans)
        through = self._see_through(spans)
        rows, features, deeper = [], [], []
        for number, span in enumerate(spans):
            num_shown = 0
            for picture, first, stop, places in _shown(span):
                if span.seen is not None:
                    seen, first, stop = span.seen, num_shown, num_shown + len(places)
                elif span.lens is not None:
                    seen = through[picture.digest, span.lens.number]
                else:
                    with _blamed_on(number):
                        seen = self.see(picture)
                num_shown += len(places)
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
        key = picture.digest, None
        known = self._kept.get(key)
        if known is None:
            self.check_room([picture])
            known = self.look(self.pixels(picture))
        return self._keep(key, known)

    def look(self, pixels: Pixels) -> Sight:
        """Through the tower as it came, without gradients."""
        self.num_looks += 1
        with torch.inference_mode(False), torch.no_grad():  # what is kept serves passes with gradients too
            return self._looked(pixels)

    def look_through(self, context: LinearContext, pixels: Sequence[Pixels]) -> Sight:
        """At some pictures end to end, with adapters; with gradients where they are switched on."""
        self.num_looks += len(pixels)
        joint = {name: torch.cat([one[name] for one in pixels]) for name in pixels[0]}
        self.holder.enter(context)
        try:
            return self._looked(joint)
        finally:
            self.holder.leave()

    def measure(self, picture: Picture) -> None:
        """Learn from one picture how much memory others will take."""
        pixels = self.pixels(picture)
        peak = peak_bytes(self.device, lambda: self.look(pixels))
        seen = self.look(pixels)
        self.row_bytes = seen.num_bytes / len(seen.features_ND)
        self.look_bytes = peak / len(seen.features_ND)

    def open_tower(self, linears: dict[str, nn.Linear], seen: Mapping[str, str]) -> tuple[LinearInfo, ...]:
        """From now on adapters may be in these layers of the tower; see `tower.open_tower`."""
        infos, self._groups = open_tower(self._model, linears, seen, self.holder)
        return infos

    def rehearse(self, picture: Picture) -> None:
        """Try whether the layers of the opened tower are called as adapters need it.

        Raises:
            UnsupportedError: a layer isn't called exactly once.
        """
        look = NoLens()
        with torch.no_grad():
            self.look_through(look, [self.pixels(picture)])
        check_looked_through(self._model, self._groups, look)
        self._sample = picture

    @property
    def room_bytes(self) -> int:
        """What is kept of pictures may yet grow by so much."""
        return max(0, self.max_bytes - self.num_bytes)

    def _looked(self, pixels: Pixels) -> Sight:
        return self.kind.look(self._model, {name: value.to(self.device) for name, value in pixels.items()})

    def _keep(self, key: tuple[bytes, int | None], seen: Sight) -> Sight:
        """The least recently used go where there is no room."""
        if key not in self._kept:
            self._kept[key] = seen
            self.num_bytes += seen.num_bytes
        self._kept.move_to_end(key)
        while self.num_bytes > self.max_bytes and len(self._kept) > 1:
            self.num_bytes -= self._kept.popitem(last=False)[1].num_bytes
        return seen

    def _see_through(self, spans: Sequence[Span]) -> dict[tuple[bytes, int], Sight]:
        """What spans show through lenses, by picture and lens: those not yet seen so are looked at together."""
        found: dict[tuple[bytes, int], Sight] = {}
        unknown: dict[tuple[bytes, int], tuple[int, Picture, Lens]] = {}
        for number, span in enumerate(spans):
            for picture, *_ in () if span.lens is None or span.seen is not None else _shown(span):
                key = picture.digest, cast(Lens, span.lens).number
                if key in self._kept:
                    found[key] = self._keep(key, self._kept[key])
                else:
                    unknown.setdefault(key, (number, picture, cast(Lens, span.lens)))
        keys = list(unknown)
        sizes = [num_features(self.info, picture) for _, picture, _ in unknown.values()]
        for part in in_looks(sizes, looks_alone=self.looks_alone):
            asked = [unknown[keys[index]] for index in part]
            pixels = []
            for number, picture, _ in asked:
                with _blamed_on(number):
                    self.check_room([picture for _, picture, _ in asked])
                    pixels.append(self.pixels(picture))
            counts = [sizes[index] for index in part]
            lenses = [lens for *_, lens in asked]
            with torch.inference_mode(False), torch.no_grad():
                seen = self.look_through(Shares(counts, partial(Lenses, lenses, self.lora)), pixels)
                for index, one in zip(part, seen.split(counts), strict=True):
                    found[keys[index]] = self._keep(keys[index], one)
        return found

    def check_room(self, pictures: Sequence[Picture], *, differentiates: bool = False) -> None:
        """
        Raises:
            UserError: there is no memory for the tower to look at these pictures together.
        """
        picture = max(pictures, key=lambda one: one.num_tokens)
        each = self._bytes_with_gradients() if differentiates else self.look_bytes
        needed = int(sum(one.num_tokens for one in pictures) * each)
        free = free_bytes(self.device)
        if free is not None and needed > free:
            raise TooLargeToSeeError(
                f"there is not enough memory to look at a picture of {picture.width} x {picture.height} pixels (about "
                f"{needed >> 20:,} MiB needed, {free >> 20:,} MiB free): send a smaller one, or have the server given "
                "more memory"
            )

    def _bytes_with_gradients(self) -> float:
        """What the tower takes for each token of a picture, where looks are differentiated: measured when it is first
        asked for, since weights are laid out for backward then, which takes memory."""
        if self._grad_bytes is None:
            assert self._sample is not None, "the tower was opened"
            sample = self._sample
            pixels = self.pixels(sample)

            def differentiate() -> None:
                with torch.enable_grad():
                    seen = self.look_through(Rehearsal(PROBE_RANK), [pixels])
                torch.autograd.backward(seen.parts, [torch.zeros_like(part) for part in seen.parts])

            differentiate()
            self._grad_bytes = peak_bytes(self.device, differentiate) / sample.num_tokens
        return self._grad_bytes

    def pixels(self, picture: Picture) -> Pixels:
        """What the model's own image processor makes of it, on the CPU."""
        upright = read_rgb(picture.data)
        if upright.size != (picture.width, picture.height):
            raise UserError(
                f"a picture of {upright.size[0]} x {upright.size[1]} pixels was announced as {picture.width} x "
                f"{picture.height}: send the size that the file has"
            )
        return cast(Pixels, self._processor(images=[upright], return_tensors="pt"))


def num_features(info: VisionInfo, picture: Picture) -> int:
    """How many embeddings it becomes; the other placeholders are ordinary tokens."""
    return int((placeholders(info, picture.width, picture.height) == info.image_token).sum())


def in_looks(sizes: Sequence[int], *, looks_alone: bool) -> Iterator[list[int]]:
    """Indices of what is looked at together, in order: at most `TOGETHER` features, but for one alone."""
    part: list[int] = []
    num = 0
    for index, size in enumerate(sizes):
        if part and (looks_alone or num + size > TOGETHER):
            yield part
            part, num = [], 0
        part.append(index)
        num += size
    if part:
        yield part


@contextmanager
def _blamed_on(number: int) -> Iterator[None]:
    """Raises: UnseenError: a picture of this span can't be looked at."""
    try:
        yield
    except UserError as error:
        raise UnseenError(error, number) from None


def _shown(span: Span) -> Iterator[tuple[Picture, int, int, IntArray]]:
    return iter(()) if span.scene is None else span.scene.shown(span.start, span.end)


def open_eyes(
    model: PreTrainedModel,
    info: VisionInfo | None,
    kind: VisionKind | None,
    path: str,
    *,
    looks_alone: bool = False,
) -> Eyes | None:
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
    processor: Any = AutoImageProcessor if kind.processor is None else kind.processor(info)
    if kind.processor is None:
        processor = processor.from_pretrained(path, backend="pil", local_files_only=True, trust_remote_code=False)
    return Eyes(info, kind, model, processor, looks_alone=looks_alone)
