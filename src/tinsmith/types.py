"""The vocabulary of the house: what an op, a run, a datum, a loss, a sample and an outcome are.

Everything here is frozen data and knows nothing of HTTP, SQL, files or torch. Arrays are numpy, so that the process
without torch can hold them too. Shape letters: N tokens of one datum, K targets a position, P prompt tokens,
S sampled tokens, R rank, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NewType

import numpy as np
import numpy.typing as npt

from tinsmith import lora_options
from tinsmith.lora_options import DEFAULT_ALPHA, PLAIN, LoraOptions
from tinsmith.loss_graph import LossGraph
from tinsmith.pictures import Picture, VisionInfo, tokens_of
from tinsmith.route_tape import RouteArray, RouteTape

TenantId = NewType("TenantId", str)
SessionId = NewType("SessionId", str)
RunId = NewType("RunId", str)  # "<session>:train:<model_seq_id>": clients derive it themselves
SamplerId = NewType("SamplerId", str)  # "<session>:sample:<sampling_session_seq_id>"
OpId = NewType("OpId", str)  # what the wire calls request_id
BlobKey = NewType("BlobKey", str)  # always begins with the tenant
Targets = lora_options.Targets

IntArray = npt.NDArray[np.int64]
TokenArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]
Array = npt.NDArray[np.int64] | npt.NDArray[np.int32] | npt.NDArray[np.float32]


class OpKind(StrEnum):
    """What one acknowledged request asks for."""

    CREATE = "create"  # seq 0 of a run: a fresh adapter, or one made from a checkpoint
    FORWARD = "forward"
    FORWARD_BACKWARD = "forward_backward"
    OPTIM_STEP = "optim_step"
    LOAD = "load"
    SAVE = "save"  # weights and optimizer state, to go on training from
    SAVE_SAMPLER = "save_sampler"  # weights alone, to sample from
    SAVE_EXTERNAL = "save_external"  # weights alone, as files for other programs
    SAMPLE = "sample"
    CREATE_LOSS = "create_loss"  # a custom loss; of a session, and carried out when it arrives

    @property
    def is_pass(self) -> bool:
        """Computed by a training pass over the base; ops of this kind commute between two barriers."""
        return self in (OpKind.FORWARD, OpKind.FORWARD_BACKWARD)

    @property
    def is_save(self) -> bool:
        """Writes a file and leaves its run as it was."""
        return self in (OpKind.SAVE, OpKind.SAVE_SAMPLER, OpKind.SAVE_EXTERNAL)

    @property
    def has_effect(self) -> bool:
        """Changes the state of its run, and so is replayed when a run is recovered."""
        return self in (OpKind.CREATE, OpKind.FORWARD_BACKWARD, OpKind.OPTIM_STEP, OpKind.LOAD)

    @property
    def is_replayed(self) -> bool:
        """May have to be carried out again when its run is recovered."""
        return self.has_effect or self is OpKind.SAVE_SAMPLER


class Role(StrEnum):
    """What a worker process of a base model does: everything, or half of it beside another worker."""

    ALL = "all"
    TRAIN = "train"  # holds the runs
    SAMPLE = "sample"

    @property
    def trains(self) -> bool:
        return self is not Role.SAMPLE

    @property
    def samples(self) -> bool:
        return self is not Role.TRAIN


class OpState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in (OpState.DONE, OpState.FAILED, OpState.CANCELLED)


class RunStatus(StrEnum):
    """READY once its CREATE op is done, FAILED if that failed; CORRUPTED while log and files don't give its state.

    COPY: made to hold copied or imported checkpoints, and can't be trained. GONE: let go, only its row is left.
    """

    CREATING = "creating"
    READY = "ready"
    FAILED = "failed"
    CORRUPTED = "corrupted"
    COPY = "copy"
    GONE = "gone"


class CheckpointKind(StrEnum):
    """The middle part of a tinker path."""

    TRAINING = "weights"
    SAMPLER = "sampler_weights"
    EXTERNAL = "external_weights"


@dataclass(frozen=True, slots=True)
class RunSpec:
    """All that is needed to make a run's adapter from nothing, to the bit."""

    run_id: RunId
    base_model: str
    rank: int = 32
    seed: int = 0
    targets: Targets = field(default_factory=Targets)
    alpha: float = DEFAULT_ALPHA  # what the adapter computes is scaled by alpha / rank, but see the options
    options: LoraOptions = PLAIN

    @property
    def is_full(self) -> bool:
        """No adapter: all weights of the base, in a copy of the run's own."""
        return self.rank == 0


@dataclass(frozen=True, slots=True)
class Datum:
    """One training sequence. Position i of `tokens` predicts target i of each input.

    tokens: int32 [N], the placeholders of `pictures` among them; pictures come in the order of their positions.
    inputs: by name, each [N] or [N, K]; `target_tokens` int64, the others float32. What a custom loss reads may have
        any length, and be int64 too.
    """

    tokens: TokenArray
    inputs: Mapping[str, Array]
    pictures: tuple[Picture, ...] = ()
    routes: RouteArray | None = None  # int16 [N, L, K], see `route_tape`

    @property
    def num_tokens(self) -> int:
        return int(self.tokens.shape[0])


@dataclass(frozen=True, slots=True)
class LossSpec:
    """`graph`: what a `custom` loss computes; the worker adds it to what the request names."""

    name: str
    config: Mapping[str, float | str] = field(default_factory=dict)
    graph: LossGraph | None = None

    def work(self, num_tokens: int) -> int:
        """What a datum of so many tokens costs to compute, in tokens: each call of its loss counts as one more."""
        return num_tokens + (0 if self.graph is None else len(self.graph.calls))


@dataclass(frozen=True, slots=True)
class AdamParams:
    """AdamW with decoupled weight decay; `grad_clip_norm` 0 means off, else a bound on the run's global norm."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


@dataclass(frozen=True, slots=True)
class TrainItem:
    """One forward or forward_backward request, as the engine takes it."""

    op_id: OpId
    run_id: RunId
    seq_id: int
    data: tuple[Datum, ...]
    loss: LossSpec
    backward: bool

    @property
    def num_tokens(self) -> int:
        return sum(d.num_tokens for d in self.data)

    @property
    def work(self) -> int:
        """Tokens, those of pictures twice, and what its loss costs beside them."""
        return sum(self.loss.work(d.num_tokens + tokens_of(d.pictures)) for d in self.data)


@dataclass(frozen=True, slots=True)
class TrainResult:
    """logprobs: one float32 array a datum, shaped as its target_tokens. Metric keys hold exactly one colon."""

    logprobs: tuple[FloatArray, ...]
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class OptimItem:
    op_id: OpId
    run_id: RunId
    params: AdamParams


@dataclass(frozen=True, slots=True)
class OptimResult:
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """max_tokens None: up to the model's context. stop_tokens None: stop at the model's own end tokens; an empty
    `stop_tokens` and `stop_strings` never stop. top_k -1: off. temperature 0: greedy.

    min_p: no token less likely than this share of the most likely one is drawn; 0: off. The penalties lower the logits
    of tokens sampled before: once each, and once for each time. json_schema: of the answer. None changes a logprob.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    json_schema: str | None = None
    stop_tokens: tuple[int, ...] | None = None
    stop_strings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptTargets:
    """Token ids to score in a prompt, in the layout in which they were sent: cells of a matrix `shape` [P-1, K].

    ids: int64, -1 asks for nothing; a cell of row i is scored at prompt position i + 1. Dense while `crow` is None:
    ids [(P-1) * K], row by row. Else CSR: crow int64 [P], cols int64 and ids as many as cells are listed.
    """

    ids: IntArray
    shape: tuple[int, int]
    crow: IntArray | None = None
    cols: IntArray | None = None

    @property
    def rows(self) -> IntArray:
        """int64: the row of each cell."""
        counts = np.diff(self.crow) if self.crow is not None else np.full(self.shape[0], self.shape[1])
        return np.repeat(np.arange(self.shape[0]), counts)


@dataclass(frozen=True, slots=True)
class SampleItem:
    """One sample request, as the engine takes it. `adapter` names loaded sampler weights; None is the plain base.

    prompt: int32 [P], with the placeholders of `pictures`. Sample i of the request draws from (seed, i, position).
    prompt_logprobs_last_n: of the prompt, score the last N tokens alone (with their top-k); None: all but the first.
    scope: only requests of one scope may share computed prompts, so that nobody learns what others asked.
    weight: the part of the seats that requests of its scope may hold, beside those of other scopes.
    prompt_alt_tokens_k: draws at each prompt position, at the request's temperature, whatever its top_k and top_p.
    """

    op_id: OpId
    adapter: str | None
    prompt: TokenArray
    params: SamplingParams
    num_samples: int
    seed: int
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    prompt_logprobs_last_n: int | None = None
    prompt_targets: PromptTargets | None = None
    prompt_alt_tokens_k: int = 0
    scope: str = ""
    weight: float = 1.0
    pictures: tuple[Picture, ...] = ()
    records_routes: bool = False


@dataclass(frozen=True, slots=True)
class SampledSequence:
    """tokens: int32 [S], the stop token included; logprobs: float32 [S], at the request's temperature.

    topk: the likeliest tokens of each position, ids int32 [S, k] and logprobs float32 [S, k], at that temperature too.
    """

    tokens: TokenArray
    logprobs: FloatArray
    stopped: bool  # False: ended at max_tokens
    topk_tokens: TokenArray | None = None
    topk_logprobs: FloatArray | None = None


@dataclass(frozen=True, slots=True)
class SamplePiece:
    """What sequence `index` of a request got from its token number `start` on, while it was still being sampled."""

    op_id: OpId
    index: int
    start: int
    sequence: SampledSequence


@dataclass(frozen=True, slots=True)
class SampleCost:
    """What was computed for a sample request, in tokens. num_cached: of the prompt, found computed already."""

    num_prefilled: int = 0
    num_cached: int = 0
    num_sampled: int = 0


@dataclass(frozen=True, slots=True)
class SampleResult:
    """All logprobs of the prompt are those of the model at temperature 1.

    prompt_logprobs: float32 [P], NaN at position 0 and wherever none was asked for.
    topk_prompt: ids int32 [P, k] and logprobs float32 [P, k]; such rows hold the sentinel token 0, logprob -99999.
    prompt_target_logprobs: float32, one for each of `prompt_targets.ids`, 0 where that is -1.
    prompt_cache_hit_tokens: prompt tokens whose keys and values came from an earlier request.
    prompt_alt: draws, ids int64 [P-1, k] and logprobs float32 [P-1, k]; row i is about position i + 1.
    """

    sequences: tuple[SampledSequence, ...]
    prompt_logprobs: FloatArray | None = None
    topk_prompt_tokens: TokenArray | None = None
    topk_prompt_logprobs: FloatArray | None = None
    prompt_targets: PromptTargets | None = None
    prompt_target_logprobs: FloatArray | None = None
    prompt_alt_tokens: IntArray | None = None
    prompt_alt_logprobs: FloatArray | None = None
    prompt_cache_hit_tokens: int = 0
    routes: RouteTape | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an op failed: a stable code, whose fault (user | capacity | server), and a message that names the cure."""

    code: str
    category: str
    message: str


@dataclass(frozen=True, slots=True)
class RunState:
    """A run's whole state on the host, in named tensors, free of any engine's memory layout.

    tensors: float32, keyed `<part>/<module>.lora_A` [R, in] and `.lora_B` [out, R] with part in param, grad, m, v.
    A sampler's snapshot holds the `param` part alone. `step` counts optimizer steps taken.
    """

    spec: RunSpec
    step: int
    tensors: Mapping[str, FloatArray]

    @property
    def has_optimizer(self) -> bool:
        return any(name.startswith("m/") for name in self.tensors)


@dataclass(frozen=True, slots=True)
class BaseInfo:
    """What the API has to know of a served base model without loading it."""

    name: str
    path: str
    arch: str
    vocab_size: int
    max_context: int
    eos_tokens: tuple[int, ...]
    is_head_tied: bool = False  # the output head is the embedding and has no weights of its own
    layer_widths: tuple[tuple[str, str, int], ...] = ()  # group, last part of the path, inputs and outputs of all such
    num_params: int = 0
    vision: VisionInfo | None = None  # None: pictures are refused
    tokenizer_path: str = ""  # the directory of its tokenizer.json; empty: `path`

    def adapter_bytes(self, spec: RunSpec) -> int:
        """Of the weights of a run's adapter on this base, float32: a LoRA pair has rank x (inputs + outputs) numbers
        (Hu et al. 2021, section 4.1). Of a full run, all of the base's."""
        if spec.is_full:
            return 4 * self.num_params
        layers = [layer for layer in self.layer_widths if layer[0] in spec.targets.groups]
        return 4 * sum(size * spec.options.rank_of(group, name, spec.rank) for group, name, size in layers)
