"""A base model, frozen, with its layers opened to a pass context.

Owns the transformers model and the hooks in it. Refuses to know files (see `model.loading`), runs, sequences and
losses. What stays true: the opened model gives the logits of the untouched one, and each hook was called (so an upgrade
of transformers that goes around a hook is refused at start, not answered with wrong numbers).
Shape letters: T rows of a pass, D hidden size, V vocabulary; H, G heads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from tinsmith.errors import UnsupportedError
from tinsmith.model.activation import replace_silu
from tinsmith.model.attention import AttentionKind, Reach, block_attention, reach_of
from tinsmith.model.blocks import replace_blocks
from tinsmith.model.context import ExpertAdapters, PassContext
from tinsmith.model.delta import Chunks, DeltaKind, mix
from tinsmith.model.experts import Experts, describe_experts, find_experts, frozen_parts, replace_experts
from tinsmith.model.families import Family, family_of, vision_of
from tinsmith.model.frozen import FrozenMatrix
from tinsmith.model.inspect import (
    LinearInfo,
    SiblingWatch,
    apart_of,
    check_head,
    check_rope,
    check_windows,
    decoder_of,
    describe_linears,
    find_linears,
)
from tinsmith.model.linear import LinearGroup, PassHolder, group_linears
from tinsmith.model.lora import NO_ADAPTERS, LoraBackend
from tinsmith.model.lora.choice import lora_for
from tinsmith.model.recompute import open_layers
from tinsmith.model.routers import ChoiceWatch, Router, replace_routers
from tinsmith.model.routes import Routes
from tinsmith.model.vision import Eyes, Scene, Sights, Span, open_eyes
from tinsmith.model.vision.tower import tower_linears
from tinsmith.model.vision.trial import Trial
from tinsmith.pictures import Picture
from tinsmith.types import BaseInfo, TokenArray

ATTENTION = "tinsmith_pass"
HOLDER = "tinsmith_holder"
KNOWN_EXTRAS = {"sliding_window", "softcap", "s_aux", "position_ids", "use_cache"}
CHECK_ROWS = 16
MAX_LOGIT_ERROR = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class BaseModel:
    """The frozen model. `num_forwards` counts walks through it; `lora` computes the adapters of training passes;
    `final` is what becomes of the head's outputs, its adapters' among them; `eyes` look at pictures, if it has any.
    Routes have `num_chosen` of `num_experts` experts for each of `num_routers` routers; 0 where they can't be
    replayed."""

    def __init__(
        self,
        model: PreTrainedModel,
        info: BaseInfo,
        family: Family,
        linears: tuple[LinearInfo, ...],
        groups: Sequence[LinearGroup],
        head: nn.Linear,
        experts: Sequence[Experts],
        router_weights: Sequence[Tensor],
        routers: Sequence[Router],
        holder: PassHolder,
        eyes: Eyes | None = None,
    ) -> None:
        self.info = info
        self.family = family
        self.final = family.final_logits(model.config.get_text_config())
        self.linears = linears
        self.head = FrozenMatrix(head.weight)
        self.num_layers = int(model.config.get_text_config().num_hidden_layers)
        self.num_forwards = 0
        self.backbone = decoder_of(model)
        self.eyes = eyes
        self._embedding: nn.Module = model.get_input_embeddings()
        self.lora: LoraBackend = lora_for(self.head.device, self.head.dtype)
        if eyes is not None:
            eyes.lora = self.lora
        self._groups = groups
        self._experts = experts
        self.router_weights = router_weights
        self.num_routers = len(routers)
        self.num_experts = experts[0].num_experts if experts else 0
        self.num_chosen = routers[0].num_chosen if routers else 0
        self._holder = holder

    @property
    def has_static_experts(self) -> bool:
        """All its experts are; also where it has none. See `Experts.is_static`."""
        return all(experts.is_static for experts in self._experts)

    @property
    def device(self) -> torch.device:
        return self.head.device

    @property
    def dtype(self) -> torch.dtype:
        return self.head.dtype

    def matrices(self) -> Iterator[FrozenMatrix]:
        """What rows of a pass are multiplied with, the head's last."""
        for group in self._groups:
            yield group.matrix
        for experts in self._experts:
            yield from experts.matrices()
        yield self.head

    def bytes_by_form(self) -> dict[str, int]:
        """What its matrices take now, by how they are kept."""
        found: Counter[str] = Counter()
        for matrix in self.matrices():
            found[matrix.form] += matrix.num_bytes
        joint = sum(experts.joint_bytes for experts in self._experts)
        return {**found, "joint experts": joint} if joint else dict(found)

    def embed(self, tokens_T: Tensor, sights: Sights | None = None) -> Tensor:
        """[T, D]; differentiated by what pictures show alone. Of rows that show one the token doesn't matter."""
        with torch.no_grad():
            if sights is None:
                return cast(Tensor, self._embedding(tokens_T))
            embeds_TD: Tensor = self._embedding(tokens_T.index_fill(0, sights.rows_M, 0))
        return embeds_TD.index_copy_(0, sights.rows_M, sights.features_MD)

    def scene(self, tokens: TokenArray, pictures: Sequence[Picture]) -> Scene | None:
        """Where the pictures of a sequence are; None if it has none.

        Raises:
            UserError: they aren't where the tokens say, or have another number of tokens.
            UnsupportedError: this model takes no pictures here.
        """
        if not pictures:
            return None
        if self.eyes is None:
            raise UnsupportedError(f"{self.info.name} takes no pictures on this server: send text alone")
        return self.eyes.scene(tokens, pictures)

    def hidden(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        context: PassContext,
        *,
        recompute: bool = False,
        sights: Sights | None = None,
    ) -> Tensor:
        """Hidden states after the last norm, [T, D], of rows that only `context` ties into sequences.

        Args:
            tokens_T, positions_T: int64; positions start at 0 in each sequence. T as `padded_rows` says. Positions may
                be [3, T] where the model counts on three axes.
            context: called for each attention and each linear layer. With autograd on it must be a GradContext, and
                backward from the result calls its `add_lora_grad`.
            recompute: keep only the layers' inputs for backward, which computes each layer a second time.
            sights: what rows that show pictures have in place of their tokens' embeddings.
        """
        self.num_forwards += 1
        embeds_TD = self.embed(tokens_T, sights)
        if torch.is_grad_enabled() and recompute:
            embeds_TD = embeds_TD.requires_grad_()  # a layer that is computed twice is differentiated by its input
        self._holder.enter(context, positions_T, recomputes=recompute)
        try:
            out = self.backbone(
                inputs_embeds=embeds_TD[None],
                position_ids=positions_T[..., None, :],
                use_cache=False,
                return_dict=True,
                **_deeper(sights, len(tokens_T)),
            )
        finally:
            self._holder.leave()
        return cast(Tensor, out.last_hidden_state)[0]


@torch.no_grad()
def open_base(
    model: PreTrainedModel,
    info: BaseInfo,
    *,
    deterministic: bool = False,
    shares_factors: bool = True,
    is_known: bool = False,
) -> BaseModel:
    """Open a model that is in memory. It is changed, and shares its weights with the base.

    is_known: a model of this very kind was opened before, with other weights: its logits aren't compared again, since
        they need not be numbers once training has diverged.

    Raises:
        UnsupportedError: the architecture has parts that can't be hooked; they are named.
    """
    model.eval().requires_grad_(False)  # type: ignore[no-untyped-call]
    head = check_head(model)
    family = family_of(model.config)
    kind = vision_of(model.config)
    towers = () if kind is None else kind.towers
    eyes = open_eyes(model, info.vision, kind, info.path, looks_alone=deterministic)
    linears = find_linears(model, head, frozen_parts(model, family), (*apart_of(model), *towers))
    of_tower = {} if eyes is None else tower_linears(model, towers)
    found = find_experts(model, family)
    check_rope(decoder_of(model))
    tokens_T = torch.arange(CHECK_ROWS, device=model.device) % info.vocab_size
    choosing = family.routers if family.expert_weights is not None or not family.routers_choose else ()
    with ChoiceWatch(model, choosing, family.routers_choose) as looking, SiblingWatch(of_tower) as seeing:
        trial = None if eyes is None else Trial(model, eyes, info.vocab_size)
    with SiblingWatch(linears) as watch, ChoiceWatch(model, choosing, family.routers_choose) as routing:
        logits_TV = model(input_ids=tokens_T[None], use_cache=False).logits[0]

    holder = PassHolder()
    infos = describe_linears(
        model, linears, head, watch.leads, describe_experts(found, family, shares_factors=shares_factors)
    )
    groups = group_linears(model, linears, watch.leads, holder)
    if eyes is not None:
        infos += eyes.open_tower(of_tower, seeing.leads)
    replace_blocks(model, family, {group.name: group for group in groups}, holder, stable=deterministic)
    router_weights = [cast(Tensor, m.weight) for m in model.modules() if type(m).__name__ in family.routers]
    leads = {info.name: info.lead for info in infos}
    experts = replace_experts(model, found, family, holder, leads, stable=deterministic)
    _replace_others(model, family, holder)
    routers = replace_routers(
        model, family.routers, family.expert_weights, holder, choose=family.routers_choose, is_even=deterministic
    )
    replace_silu(model)
    _hook_attention(model, holder)
    base = BaseModel(model, info, family, infos, groups, head, experts, router_weights, routers, holder, eyes)
    open_layers(base.backbone, base.num_layers, holder)
    _check(base, groups, model, tokens_T, None if is_known else logits_TV, routing.choices)
    if trial is not None:
        _check_trial(base, trial, model, looking.choices)
    base.num_forwards = 0
    return base


def _replace_others(model: PreTrainedModel, family: Family, holder: PassHolder) -> None:
    """Modules that hooks can't carry."""
    for path, module in list(model.named_modules()):
        stand_in = family.stand_ins.get(type(module).__name__)
        if stand_in is not None:
            model.set_submodule(path, stand_in(module, holder))


def _hook_attention(model: PreTrainedModel, holder: PassHolder) -> None:
    """Route the model's attention to the pass context. A name that has no mask function gets no mask built."""
    AttentionInterface.register(ATTENTION, _attend)
    decoder = decoder_of(model)
    decoder.set_attn_implementation(ATTENTION)
    for module in decoder.modules():
        if hasattr(module, "layer_idx"):
            setattr(module, HOLDER, holder)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **extras: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [1, heads, T, D] each in, [1, T, H, D] out.

    Values may be narrower or wider than keys (MLA, arXiv 2405.04434, section 2.1): what is narrower gets zeros.
    """
    strange = sorted(name for name, value in extras.items() if name not in KNOWN_EXTRAS and value is not None)
    if attention_mask is not None or dropout or strange:
        raise UnsupportedError(
            f"{type(module).__name__} wants {', '.join(strange) or 'a mask or dropout'} in its attention, which is not "
            "served; causal attention is, also with a sliding window, capped scores or sinks"
        )
    kind = AttentionKind(
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        extras.get("sliding_window"),
        extras.get("softcap"),
        extras.get("s_aux"),
    )
    context = cast(PassHolder, getattr(module, HOLDER)).context
    width = max(query.shape[-1], value.shape[-1])
    q_HTD, k_GTD, v_GTD = (_widened(states[0], width) for states in (query, key, value))
    out_THD = context.attend(cast(int, module.layer_idx), q_HTD, k_GTD, v_GTD, kind)
    return out_THD[None, ..., : value.shape[-1]], None


def _widened(x: Tensor, width: int) -> Tensor:
    """[..., D] -> [..., width], with zeros."""
    return F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x


class _CheckContext:
    """One sequence over all rows, no adapters; counts what was called."""

    def __init__(self, choices: Sequence[Tensor], reach: Reach | None = None) -> None:
        self.choices = choices
        self.reach = reach
        self.layers: Counter[int] = Counter()
        self.windows: dict[int, int | None] = {}
        self.groups: Counter[str] = Counter()
        self.mixtures: Counter[str] = Counter()

    def attend(self, layer: int, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, kind: AttentionKind) -> Tensor:
        self.layers[layer] += 1
        self.windows[layer] = kind.window
        return block_attention(q_HTD[None], k_GTD[None], v_GTD[None], 0, kind, self.reach)[0].transpose(0, 1)

    def mix(self, layer: int, mixed_TC: Tensor, g_TH: Tensor, beta_TH: Tensor, kind: DeltaKind) -> Tensor:
        self.layers[layer] += 1
        return mix(mixed_TC, g_TH, beta_TH, kind, Chunks([(len(mixed_TC), 0)], mixed_TC.device))

    def add_lora(self, group: str, x_TI: Tensor, y_TO: Tensor) -> tuple[Tensor, ...]:
        self.groups[group] += 1
        return ()

    def experts(self, name: str, routes: Routes) -> ExpertAdapters:
        self.mixtures[name] += 1
        return NO_ADAPTERS

    def choose(self, router: int, experts_TK: Tensor) -> Tensor:
        """The plain model's choice, since rounding may tip another one, backwards: so the weights are made anew."""
        return self.choices[router].flip(1) if self.choices else experts_TK


def _check(
    base: BaseModel,
    groups: Sequence[LinearGroup],
    model: PreTrainedModel,
    tokens_T: Tensor,
    expected_TV: Tensor | None,
    choices: Sequence[Tensor],
) -> None:
    kind = type(model).__name__
    context = _CheckContext(choices)
    with torch.no_grad():
        h_TD = base.hidden(tokens_T, torch.arange(len(tokens_T), device=base.device), context)
    if context.layers != Counter(range(base.num_layers)):
        raise UnsupportedError(
            f"{kind}: attention of its {base.num_layers} layers was reached as {dict(context.layers)}"
        )
    check_windows(model, context.windows)
    wrong = {name for group in groups if context.groups[group.name] != 1 for name in group.names}
    wrong |= {name for group in groups for name in group.drop_parts()}
    if wrong:
        raise UnsupportedError(f"{kind}: linear layers not called exactly once: {', '.join(sorted(wrong)[:6])}")
    unseen = sorted({info.lead.rpartition(".")[0] for info in base.linears if info.is_of_experts} - {*context.mixtures})
    if unseen:
        raise UnsupportedError(f"{kind}: experts that aren't called: {', '.join(unseen[:6])}")
    if expected_TV is not None:
        what = "it does something between hidden states and logits, or in attention"
        _check_logits(base, model, h_TD, expected_TV, what)


def _check_trial(base: BaseModel, trial: Trial, model: PreTrainedModel, choices: Sequence[Tensor]) -> None:
    """The same with a picture among the tokens."""
    assert base.eyes is not None, "who has no eyes has no trial"
    base.eyes.rehearse(trial.picture)
    num = len(trial.tokens_T)
    positions_T = torch.from_numpy(trial.scene.positions(0, num)).to(base.device)
    context = _CheckContext(choices, reach_of(trial.scene.last_seen(0, num), base.device))
    sights = base.eyes.sights([Span(trial.scene, 0, num, 0)])
    with torch.no_grad():
        h_TD = base.hidden(trial.tokens_T, positions_T, context, sights=sights)
    _check_logits(base, model, h_TD, trial.logits_TV, "with a picture it does something")


def _check_logits(base: BaseModel, model: PreTrainedModel, h_TD: Tensor, expected_TV: Tensor, what: str) -> None:
    logits_TV = base.final.apply_(base.head.times(h_TD))
    if not expected_TV.isfinite().all():
        name = str(base.dtype).removeprefix("torch.")
        cure = (
            "start with --dtype bfloat16, whose range is float32's" if base.dtype == torch.float16 else "fetch it again"
        )
        raise UnsupportedError(f"{type(model).__name__}: its logits are not finite in {name}: {cure}")
    error = float((logits_TV - expected_TV).abs().max() / expected_TV.abs().max())
    if not error <= MAX_LOGIT_ERROR[base.dtype]:
        raise UnsupportedError(
            f"{type(model).__name__}: the opened model's logits differ from its own by {error:.1e} of their range: "
            f"{what} that is not carried here"
        )


def _deeper(sights: Sights | None, num_rows: int) -> dict[str, Any]:
    """How transformers' decoders take features that are added after their first layers."""
    if sights is None or not sights.deeper:
        return {}
    mask_T = torch.zeros(num_rows, dtype=torch.bool, device=sights.rows_M.device)
    mask_T[sights.rows_M] = True
    return {"visual_pos_masks": mask_T[None], "deepstack_visual_embeds": list(sights.deeper)}
