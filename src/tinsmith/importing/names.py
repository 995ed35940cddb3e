"""Names of tensors in adapters of others, and of their modules, made comparable with those of the served base.

Prefixes differ with how a model was wrapped when the adapter was saved (`base_model.model.`, `model.language_model.`),
and `peft` may write an adapter's own name into each key (`lora_A.default.weight`); what is left is the place in the
model. Experts come in three layouts, see `experts`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tinsmith.bases.layer_table import HEAD, HEAD_STATE_NAME, Layer
from tinsmith.errors import UnsupportedError, UserError, echo

HALF = re.compile(r"(.+)\.lora_([AB])(?:\.([^.]+))?(?:\.weight)?")
WRAPPERS = frozenset({"base_model", "model", "language_model"})
KINDS = {
    "lora_magnitude_vector": "DoRA's magnitudes",
    "lora_embedding_A": "an adapter of an embedding",
    "lora_embedding_B": "an adapter of an embedding",
    "modules_to_save": "a whole module (modules_to_save)",
    "token_adapter": "trained tokens",
    "bias": "a bias",
}
WHOLE = re.compile(r"(?:.+\.)?(lm_head|embed_tokens|embed_in|embed_out)(?:\.base_layer)?\.weight")
HEADS = (HEAD, HEAD_STATE_NAME.rpartition(".")[2], "embed_out")  # the last is GPT-NeoX's before transformers 5
EXPERTS = "experts"
TOWER, OLDER = "vision_tower", "vision_model"  # a module that transformers had in the tower before 5.0
OWN_NAMES = {
    "w1": "w1", "w2": "w2", "w3": "w3", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sorted:
    """pairs: by module as the file names it (without `base_model.model.`), its (lora_A, lora_B) keys. whole: keys of
    the base's own head or embedding, which `peft` saves beside an adapter of the head."""

    pairs: Mapping[str, tuple[str, str]]
    whole: Sequence[str]


def sort_keys(keys: Iterable[str]) -> Sorted:
    """Raises: UserError: a key is no half of an adapter, or its other half is missing; the message names it."""
    halves: dict[str, dict[str, str]] = {}
    whole: list[str] = []
    adapters: set[str] = set()
    for key in sorted(keys):
        found = HALF.fullmatch(key)
        if found is not None:
            module, half, adapter = found.groups()
            adapters.add("" if adapter in (None, "weight") else adapter)
            halves.setdefault(module.removeprefix("base_model.model."), {})[half] = key
        elif WHOLE.fullmatch(key):
            whole.append(key)
        else:
            what = next((what for part, what in KINDS.items() if part in key.split(".")), "no half of a LoRA adapter")
            raise UnsupportedError(f"the adapter holds {echo(key)}: {what}, which can't be carried")
    if not halves:
        raise UserError("the file holds no adapter: no lora_A and lora_B")
    if len(adapters) > 1:
        raise UserError(f"the file holds several adapters ({', '.join(map(echo, sorted(adapters)[:4]))}): save one")
    for module, found_halves in halves.items():
        if len(found_halves) != 2:
            (half,) = found_halves
            raise UserError(f"{echo(module)} has lora_{half} without its other half")
    return Sorted({module: (pair["A"], pair["B"]) for module, pair in halves.items()}, whole)


def place_of(module: str) -> str:
    """The module's place in the model, whatever wraps that."""
    parts = [part for part in module.split(".") if part not in WRAPPERS]
    if TOWER in parts and OLDER in parts:
        parts.remove(OLDER)
    place = ".".join(parts)
    return HEAD if place in HEADS else place


def expert_place(module: str) -> tuple[str, str] | None:
    """(the place that all experts of a layer have in common, what follows `experts`), or None: not of experts.

    The first is the layer's number with what stands before it: the module around the experts has other names in other
    releases (`block_sparse_moe`, `mlp`), and a layer has one set of experts.
    """
    parts = place_of(module).split(".")
    if EXPERTS not in parts:
        return None
    at = parts.index(EXPERTS)
    number = next((i for i, part in enumerate(parts[:at]) if part.isdigit()), None)
    if number is None:
        return None
    return ".".join(parts[: number + 1]), ".".join(parts[at + 1 :])


class Places:
    """The base's layers by place."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._plain: dict[str, list[Layer]] = {}
        self.experts: dict[str, dict[str, Layer]] = {}
        for layer in layers:
            found = expert_place(layer.name) if layer.is_of_experts else None
            if found is None:
                self._plain.setdefault(place_of(layer.name), []).append(layer)
            else:
                self.experts.setdefault(found[0], {})[found[1]] = layer

    def plain(self, module: str) -> Layer:
        """Raises: UserError: the base has no such layer, or none that carries an adapter."""
        found = self._plain.get(place_of(module), [])
        if len(found) != 1:
            raise UserError(
                f"the served base has no layer {echo(module)} that carries adapters: the adapter is of another model, "
                "or trains a part (a router, an embedding) that can't be trained here"
            )
        return found[0]

    def of_experts(self, module: str, place: str) -> Mapping[str, Layer]:
        """Those of one mixture by w1, w2, w3. Raises: UserError: there is none."""
        if place not in self.experts:
            raise UserError(f"the served base has no experts at {echo(module)}: the adapter is of another model")
        return self.experts[place]
