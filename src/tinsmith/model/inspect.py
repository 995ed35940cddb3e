"""What a loaded transformers model consists of, and whether every part of it can be carried.

Pure looking: nothing is changed here. A model with a part that the pass could not hook is refused by name, since
leaving it alone would give wrong numbers in silence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from tinsmith.bases.catalog import ATTN_PARTS, GATES, MLP_PARTS
from tinsmith.errors import UnsupportedError
from tinsmith.types import Targets

HEAD = "lm_head"

STATIC_ROPE = frozenset({"default", "linear", "llama3", "yarn", "proportional"})


@dataclass(frozen=True, slots=True)
class LinearInfo:
    """A linear layer that can carry an adapter.

    group: see `lora_options.GROUPS`. lead: the first of the layers that share this one's input; itself, if none does.
    num_a, num_b: how many As and Bs an adapter has here; 0 for one of each, which isn't of experts. An A or B that is
    alone belongs to all experts. interleaves: of experts whose base has gate and up row by row in turn.
    """

    name: str
    group: str
    in_features: int
    out_features: int
    lead: str
    num_a: int = 0
    num_b: int = 0
    interleaves: bool = False

    @property
    def layer(self) -> str:
        """The last part of its path."""
        return self.name.rpartition(".")[2]

    @property
    def is_of_experts(self) -> bool:
        return self.num_a > 0

    def is_targeted(self, targets: Targets) -> bool:
        return self.group in targets.groups


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The layers that tokens go through, between the embedding and the head; some models call it otherwise than they
    say, and Llama 4 with vision says the language model with its head."""
    found: object = model.get_decoder()  # type: ignore[no-untyped-call]
    inner = cast(PreTrainedModel, model.get_submodule("model") if found is model else found)
    return decoder_of(inner) if hasattr(inner, HEAD) else inner


def apart_of(model: PreTrainedModel) -> tuple[str, ...]:
    """Paths of what stands beside the decoder, such as towers for pictures: no token goes through it."""
    decoder = decoder_of(model)
    place = next(name for name, module in model.named_modules() if module is decoder).rpartition(".")[0]
    beside = model.get_submodule(place).named_children() if place else ()
    return tuple(f"{place}.{name}" for name, module in beside if module is not decoder)


def find_linears(
    model: nn.Module, head: nn.Module, carried: Iterable[nn.Module] = (), apart: Sequence[str] = ()
) -> dict[str, nn.Linear]:
    """The linear layers of attention and MLP by path, in the model's order; the output head is not among them, nor are
    layers without a number, such as those of shared experts of which there are none.

    carried: modules whose own weights are known otherwise. apart: paths of modules that aren't looked at.

    Raises:
        UnsupportedError: the model has weights that are neither these, nor norms, nor the embedding; they are named.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head and module.weight.numel() and not _is_in(name, apart)
    }
    gates = {name for name in found if name.rpartition(".")[2] in GATES}
    linears = {name: module for name, module in found.items() if name not in gates and _group(name) is not None}
    known = {id(p) for name in gates for p in found[name].parameters()}
    known |= {id(p) for module in linears.values() for p in module.parameters()}
    known |= {id(p) for module in carried for p in module.parameters()}
    known |= {id(p) for p in head.parameters()}
    known |= {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    own = ((name, p) for name, p in model.named_parameters() if not _is_in(name, apart))
    strange = [name for name, p in own if id(p) not in known and p.ndim != 1 and p.numel()]
    if strange:
        raise UnsupportedError(
            f"{type(model).__name__} has parts that can't be trained here: {_summary(strange)}; "
            "models whose attention and MLP are made of nn.Linear layers can be served, and experts of known families"
        )
    return linears


def describe_linears(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    head: nn.Linear,
    leads: Mapping[str, str],
    of_experts: Iterable[LinearInfo] = (),
) -> tuple[LinearInfo, ...]:
    """The layers an adapter may have, in the model's order, the output head last as `lm_head`."""
    infos = [
        LinearInfo(name, _group(name) or "", m.in_features, m.out_features, leads[name]) for name, m in linears.items()
    ]
    order = {path: number for number, (path, _) in enumerate(model.named_modules())}
    infos = sorted([*infos, *of_experts], key=lambda i: order[_parent(i.name) if i.is_of_experts else i.name])
    return (*infos, LinearInfo(HEAD, "unembed", head.in_features, head.out_features, HEAD))


class SiblingWatch:
    """Sees, while the model runs as it came, which linear layers of one module are called with the same tensor."""

    def __init__(self, linears: Mapping[str, nn.Linear]) -> None:
        self.leads = {name: name for name in linears}
        self._last: tuple[str, Tensor] | None = None
        self._hooks = [m.register_forward_pre_hook(partial(self._see, name)) for name, m in linears.items()]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._last = None
        for hook in self._hooks:
            hook.remove()

    def _see(self, name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        if self._last is not None and self._last[1] is x and _parent(self._last[0]) == _parent(name):
            self.leads[name] = self.leads[self._last[0]]
        self._last = name, x


def check_head(model: PreTrainedModel) -> nn.Linear:
    """Raises: UnsupportedError: no output head, or one that isn't a plain matrix."""
    head: object = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(head, nn.Linear) or [name for name, _ in head.named_parameters()] != ["weight"]:
        raise UnsupportedError(f"{type(model).__name__}: its output head is not an nn.Linear without bias")
    return head


def check_rope(model: nn.Module) -> None:
    """Raises: UnsupportedError: rotary frequencies that change with the longest sequence of a batch."""
    for name, module in model.named_modules():
        kinds = getattr(module, "rope_type", "default")
        for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
            if kind not in STATIC_ROPE:
                raise UnsupportedError(
                    f"{type(model).__name__}: {name} scales rope by {kind!r}, which depends on the other sequences of "
                    f"a pass; can be served: {', '.join(sorted(STATIC_ROPE))}"
                )


def check_windows(model: PreTrainedModel, windows: Mapping[int, int | None]) -> None:
    """windows: the window that the attention of each layer asked for; None for one that sees everything before it.

    A window longer than the tokens of the check at the start would be missed there.

    Raises:
        UnsupportedError: a layer has another by its configuration: it is made with masks alone, which aren't served.
    """
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ()
    wanted = {"sliding_attention": getattr(config, "sliding_window", None), "full_attention": None}
    wrong = [n for n, found in sorted(windows.items()) if n < len(kinds) and wanted.get(kinds[n], found) != found]
    if wrong:
        raise UnsupportedError(
            f"{type(model).__name__}: sliding windows of its attention are made with masks alone, which isn't served: "
            f"layer {wrong[0]} is {kinds[wrong[0]]} of {wanted[kinds[wrong[0]]]}, and asks for {windows[wrong[0]]}"
        )


def _is_in(name: str, paths: Sequence[str]) -> bool:
    return any(name.startswith(f"{path}.") for path in paths)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _group(name: str) -> str | None:
    parts = set(name.split("."))
    if parts & ATTN_PARTS:
        return "attn"
    return "mlp" if parts & MLP_PARTS else None


def _summary(names: list[str]) -> str:
    """`model.layers.*.mlp.experts.gate_up_proj` once, not for each layer."""
    merged = dict.fromkeys(".".join(_starred(name)) for name in names)
    return ", ".join(list(merged)[:6]) + (", ..." if len(merged) > 6 else "")


def _starred(name: str) -> Iterator[str]:
    return ("*" if part.isdigit() else part for part in name.split("."))
