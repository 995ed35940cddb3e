"""Which base models are served, and what can be known of one from its directory without loading it.

Owns the meaning of NAME, PATH and NAME=PATH. Reads small JSON files and the headers of weight files; never loads
weights, never touches the network (`hub` does), knows neither torch nor transformers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from tinsmith.bases.tokenizer_files import check_tokenizer, converted, read_json, tokenizer_bytes
from tinsmith.bases.vision_files import read_vision
from tinsmith.bases.weight_headers import read_header, weight_files
from tinsmith.errors import ConfigError, echo
from tinsmith.lora_options import VISION
from tinsmith.pictures import SHOWN
from tinsmith.types import BaseInfo

SHIPPED_NAME = "tinsmith/tiny"
SHIPPED_PATH = Path(__file__).parents[1] / "assets" / "tiny"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
LLAMA, LLAMA_TOKENIZER = "meta-llama/Llama-3", "thinkingmachineslabinc/meta-llama-3-instruct-tokenizer"
ATTN_PARTS = frozenset(
    {"self_attn", "attn", "attention", "self_attention", "linear_attn"}
)  # in names of layers, as in `model.inspect`
MLP_PARTS = frozenset({"mlp", "feed_forward", "ffn"})
TOWER_PARTS = frozenset({"visual", "vision_tower", "vision_model", "multi_modal_projector"})  # pictures alone go there
PROJECTORS = frozenset(
    {"merger", "deepstack_merger_list", "multi_modal_projector"}
)  # from the tower to the language model
POOLERS = frozenset({"head"})  # of a tower, which make one embedding of a whole picture: not used here
CODED = ("F8_E4M3", "F8_E5M2", "U8")  # numbers in fewer bits, and scales
BLOCKS, SCALES = "_blocks", ("_scales", "_scale", "_scale_inv")  # of MXFP4, two numbers a byte; of all forms
FOUR_BITS = 0.56  # bytes a number, with its share of the scales
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
OF_EXPERTS = re.compile(r"(.+\.experts)\.(?:(\d+)\.)?")  # one tensor for each expert, or for all of a layer
GATES = frozenset({"shared_expert_gate"})  # one number a row: layers that are never trained
ROUTERS = frozenset({"gate", "router"}) | GATES  # beside the experts
EXPERT_LAYERS = ("w1", "w2", "w3")  # as in `model.experts`
HEAD = "lm_head"  # as in `model.inspect`
HEAD_OF = {"embed_tokens": HEAD, "embed_in": "embed_out"}  # what weights of a head are called where the embedding is so

QUANTISATION = ("quantization_config", "compression_config")  # in config.json, or in its text_config


@dataclass(frozen=True, slots=True)
class BaseRef:
    """A base model under the name that clients use. `path` None: it has yet to be fetched from the hub."""

    name: str
    path: Path | None

    @property
    def directory(self) -> Path:
        """Where its files are.

        Raises:
            ConfigError: they have not been fetched.
        """
        if self.path is None:
            raise ConfigError(f"--base-model {self.name}: not a directory here; `tinsmith serve` fetches it first")
        return self.path

    def __str__(self) -> str:
        return self.name if self.path is None else f"{self.name}={self.path}"


def parse(text: str) -> BaseRef:
    """A base from NAME=PATH, PATH or NAME (the shipped model, or a hub id `organisation/model`).

    An existing directory wins over a hub id of the same spelling. A PATH alone is named by its last part.

    Raises:
        ConfigError: it is none of these, or its directory lacks what a model needs.
    """
    try:
        return _parse(text)
    except (OSError, ValueError, RuntimeError) as error:  # a NUL, a name beyond the file system's, nobody's home
        raise ConfigError(f"--base-model {echo(text)}: no path that can be looked at ({echo(str(error))})") from None


def _parse(text: str) -> BaseRef:
    name, equals, given = text.partition("=")
    if equals:
        return _local(text, name.strip(), given.strip())
    if text == SHIPPED_NAME:
        return BaseRef(SHIPPED_NAME, SHIPPED_PATH)
    if Path(text).expanduser().is_dir() or text.startswith((".", "/", "~")):
        return _local(text, Path(text).expanduser().absolute().resolve().name, text)
    if HUB_ID.fullmatch(text):
        return BaseRef(text, None)
    raise ConfigError(
        f"--base-model {text}: neither a directory nor a hub id (organisation/model); "
        f"name a Hugging Face directory with NAME=PATH"
    )


def parse_all(texts: Sequence[str]) -> tuple[BaseRef, ...]:
    """All bases of a server, in order.

    Raises:
        ConfigError: one of them can't be, or two have the same name.
    """
    refs = tuple(parse(text) for text in texts)
    names = [ref.name for ref in refs]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--base-model: two models are called {name}; give one another name with NAME=PATH")
    _check_tokenizers(refs)
    return refs


def hub_name(name: str) -> str:
    """Where clients look for the tokenizer of a base: up to a colon, and without the variant of org/model/variant."""
    return "/".join(name.partition(":")[0].split("/")[:2])


def hub_names(names: Iterable[str]) -> dict[str, str]:
    """Each name that clients may ask for tokenizers by, and the base that it means: the bases' own, those that they are
    shortened to, and the one that SDK clients load for the Llama 3 models, which are gated."""
    names = tuple(names)
    known = {name: name for name in names}
    for name in names:
        known.setdefault(hub_name(name), name)
        if name.startswith(LLAMA):
            known.setdefault(LLAMA_TOKENIZER, name)
    return known


def describe(
    ref: BaseRef, *, shares_factors: bool = True, max_context: int = 0, data_dir: Path | None = None
) -> BaseInfo:
    """What clients and checks have to know of a base, from its config.json and generation_config.json.

    `arch` is the config's model_type. The end tokens are those of generation_config, else of config. shares_factors:
    adapters of experts do (`--expert-adapters`). max_context: what `--max-context-tokens` says; 0: as the config does.
    data_dir: where the tokenizer is converted to if it must be; None: its text isn't needed.

    Raises:
        ConfigError: a file is missing, not JSON, or lacks a field; the tokenizer can't be converted.
    """
    path = ref.directory
    config = read_json(path / "config.json")
    text = config.get("text_config")
    inner = {**config, **text} if isinstance(text, dict) else config
    generation = read_json(path / "generation_config.json") if (path / "generation_config.json").is_file() else {}
    vision = read_vision(path, config) if config.get("model_type") in SHOWN else None
    try:
        vocab_size, own_context = int(inner["vocab_size"]), int(inner["max_position_embeddings"])
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ConfigError(
            f"{path / 'config.json'}: vocab_size and max_position_embeddings are needed, as in a causal language model"
        ) from None
    if vocab_size < 1 or own_context < 1:
        raise ConfigError(f"{path / 'config.json'}: vocab_size and max_position_embeddings must be at least 1")
    eos = generation.get("eos_token_id")
    return BaseInfo(
        name=ref.name,
        path=str(path),
        arch=str(config.get("model_type", "")),
        vocab_size=vocab_size,
        max_context=min(own_context, max_context or own_context),
        eos_tokens=_ids(inner.get("eos_token_id") if eos is None else eos),
        is_head_tied=_is_head_tied(path),
        num_params=num_params(path),
        vision=vision,
        layer_widths=_widths(path, inner, shares_factors=shares_factors, sees=vision is not None),
        tokenizer_path="" if data_dir is None else str(converted(path, data_dir)),
    )


def is_of_tower(name: str) -> bool:
    """Whether a layer of that path, which is a linear one, carries adapters of a vision tower: those of attention and
    MLP, and what brings their outputs to the language model. Not the first one, which sees pixels."""
    parts = set(name.split("."))
    return bool(parts & TOWER_PARTS and parts & (ATTN_PARTS | MLP_PARTS | PROJECTORS)) and not parts & POOLERS


def num_params(path: Path) -> int:
    """Parameters in the directory's safetensors files, from their headers alone; of weights in fewer bits those that
    they stand for.

    Raises:
        ConfigError: a header can't be read.
    """
    return sum(
        prod(shape) * (2 if name.endswith(BLOCKS) and dtype in CODED else 1)
        for file in weight_files(path)
        for name, (shape, dtype) in _header(file).items()
        if not name.endswith(SCALES)
    )


def weight_bytes(path: Path, kept: str, bytes_each: float) -> int:
    """What the directory's weights take once they are loaded, about, from their headers alone.

    kept: as `--base-weights` says. bytes_each: of a number that is not in fewer bits.

    Raises:
        ConfigError: a header can't be read.
    """
    total = 0.0
    for file in weight_files(path):
        for name, (shape, dtype) in _header(file).items():
            numbers = prod(shape)
            is_matrix = len(shape) > 1 and bool(set(name.split(".")) & (ATTN_PARTS | MLP_PARTS))
            if dtype not in CODED:
                total += numbers * (FOUR_BITS if kept in ("int4", "nf4") and is_matrix else bytes_each)
            elif kept == "dequantised":
                total += numbers * bytes_each * (2 if name.endswith(BLOCKS) else 1)
            else:
                total += numbers
    return int(total)


def weight_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Of all tensors in the directory's safetensors files, by name. Raises: ConfigError: a header can't be read."""
    return {name: tuple(shape) for file in weight_files(path) for name, shape in _shapes(file).items()}


def text_model_type(path: Path) -> str:
    """`model_type` of the text model. Raises: ConfigError: config.json can't be read."""
    config = read_json(path / "config.json")
    inner = config.get("text_config")
    return str((inner if isinstance(inner, dict) else config).get("model_type", ""))


def is_quantised(path: Path) -> bool:
    """Whether config.json says so. Raises: ConfigError: it can't be read."""
    config = read_json(path / "config.json")
    inner = config.get("text_config")
    parts = [config, inner] if isinstance(inner, dict) else [config]
    return any(part.get(name) for part in parts for name in QUANTISATION)


def _local(text: str, name: str, given: str) -> BaseRef:
    if not name or not given:
        raise ConfigError(f"--base-model {text}: write it as NAME=PATH")
    if not all(hub_name(name).split("/")) or name.count("/") > 2:
        raise ConfigError(
            f"--base-model {text}: clients could not look for the tokenizer of {name!r}; name it model, org/model or "
            "org/model/variant with NAME=PATH"
        )
    path = Path(given).expanduser().absolute().resolve()
    if "," in f"{name}{path}":
        raise ConfigError(f"--base-model {text}: names and paths of models can't contain a comma")
    if not path.is_dir():
        raise ConfigError(f"--base-model {text}: there is no directory {path}")
    if not (path / "config.json").is_file():
        raise ConfigError(f"--base-model {text}: {path} has no config.json; it must be a Hugging Face model directory")
    try:
        check_tokenizer(path)
    except ConfigError as error:
        raise ConfigError(f"--base-model {text}: {error.message}") from None
    files = weight_files(path)
    if not files:
        raise ConfigError(f"--base-model {text}: {path} has no weights (model.safetensors, or an index and its shards)")
    lacking = [file.name for file in files if not file.is_file()]
    if lacking:
        raise ConfigError(f"--base-model {text}: {path} lacks {', '.join(lacking[:3])}: fetch its files again")
    return BaseRef(name, path)


def _check_tokenizers(refs: Sequence[BaseRef]) -> None:
    """Raises: ConfigError: clients would load the tokenizer of one base for another that has a different one."""
    by_name = {ref.name: ref for ref in refs}
    known = hub_names(by_name)
    for ref in refs:
        meant = by_name[known[hub_name(ref.name)]]
        if None in (ref.path, meant.path) or meant.path == ref.path:
            continue
        if len({tokenizer_bytes(each.directory) for each in (meant, ref)}) > 1:
            raise ConfigError(
                f"--base-model: clients look for the tokenizers of {meant.name} and {ref.name} under one name, "
                f"{hub_name(ref.name)}, and they differ; give one another name with NAME=PATH"
            )


def _ids(value: object) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,)
    return tuple(v for v in value if isinstance(v, int)) if isinstance(value, list) else ()


def _is_head_tied(path: Path) -> bool:
    """No output head among the stored weights, under any prefix; False where there are none at all."""
    names = [name for file in weight_files(path) for name in _shapes(file)]
    return bool(names) and not any(map(is_of_head, names))


def is_of_head(name: str) -> bool:
    """Whether a stored weight is the output head's, under any prefix."""
    return f".{name}".endswith(tuple(f".{head}.weight" for head in HEAD_OF.values()))


def _widths(
    path: Path, config: Mapping[str, Any], *, shares_factors: bool, sees: bool
) -> tuple[tuple[str, str, int], ...]:
    """Inputs and outputs of the linear layers, by the group that their names put them in; a head without weights of its
    own has the embedding's. Routers, and layers beyond those of the model, carry no adapters. sees: its vision tower is
    served.

    Returns:
        `BaseInfo.layer_widths`.
    """
    depth = config.get("num_hidden_layers")
    shapes = {
        name: shape
        for file in weight_files(path)
        for name, shape in _shapes(file).items()
        if not isinstance(depth, int)
        or set(name.split(".")) & TOWER_PARTS
        or all(int(layer) < depth for layer in LAYER.findall(name))
    }
    num_experts: dict[str, int] = {}
    for name, shape in shapes.items():
        found = OF_EXPERTS.match(name)
        if found is not None:
            place, number = found.groups()
            count = int(number) + 1 if number else shape[0]
            num_experts[place] = max(num_experts.get(place, 0), count)
    mixtures = {place.rpartition(".")[0] for place in num_experts}
    widths: Counter[tuple[str, str]] = Counter()
    embedding = 0
    for name, shape in shapes.items():
        parent, _, layer = name.removesuffix(".weight").rpartition(".")
        is_router = parent in mixtures and layer in ROUTERS
        parts = set(name.split("."))
        if len(shape) != 2 or not name.endswith(".weight") or is_router or OF_EXPERTS.match(name):
            continue
        if parts & TOWER_PARTS:
            if sees and is_of_tower(name):
                widths[VISION, layer] += sum(shape)
        elif parts & ATTN_PARTS:
            widths["attn", layer] += sum(shape)
        elif parts & MLP_PARTS:
            widths["mlp", layer] += sum(shape)
        elif is_of_head(name):
            widths["unembed", HEAD] += sum(shape)
        elif parts & {*HEAD_OF, "wte"}:
            embedding = sum(shape)
    for number in num_experts.values():
        for layer in EXPERT_LAYERS:
            widths["mlp", layer] += _expert_width(config, number, shares_factors=shares_factors)
    widths["unembed", HEAD] = widths["unembed", HEAD] or embedding
    return tuple((*names, width) for names, width in sorted(widths.items()))


def _expert_width(config: Mapping[str, Any], number: int, *, shares_factors: bool) -> int:
    """Of one of the three products of one layer's experts, which are between the hidden states and the experts' own
    width. Where factors are shared, the one on the side of the hidden states counts once."""
    hidden, inner = config.get("hidden_size"), config.get("moe_intermediate_size") or config.get("intermediate_size")
    if not isinstance(hidden, int) or not isinstance(inner, int):
        return 0
    return hidden * (1 if shares_factors else number) + inner * number


def _shapes(file: Path) -> dict[str, list[int]]:
    return {name: shape for name, (shape, _) in _header(file).items()}


def _header(file: Path) -> dict[str, tuple[list[int], str]]:
    """Shapes and dtypes of the tensors of a safetensors file."""
    try:
        return {name: (entry["shape"], str(entry["dtype"])) for name, entry in read_header(file).items()}
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{file} is not a whole safetensors file: {error}") from None
