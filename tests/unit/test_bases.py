from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file

from tests.kimi import write_tokenizer
from tinsmith.bases import catalog as bases
from tinsmith.bases import hub
from tinsmith.bases.catalog import SHIPPED_NAME, SHIPPED_PATH, BaseRef, describe, hub_name, hub_names, parse, parse_all
from tinsmith.bases.tokenizer_files import tokenizer_files
from tinsmith.errors import ConfigError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SHIPPED_PATH, tmp_path / "mine"))


def test_the_shipped_model_needs_no_path() -> None:
    assert parse("tinsmith/tiny") == BaseRef(SHIPPED_NAME, SHIPPED_PATH)


def test_a_directory_can_have_any_name(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse(f"Qwen/Qwen3-8B={model}") == BaseRef("Qwen/Qwen3-8B", model.resolve())
    assert parse(str(model)) == BaseRef("mine", model.resolve())
    monkeypatch.chdir(model.parent)
    assert parse("./mine") == parse("mine") == BaseRef("mine", model.resolve())
    assert parse(str(parse("a=./mine"))) == parse("a=./mine")


def test_a_hub_id_is_left_to_be_fetched() -> None:
    ref = parse("Qwen/Qwen3-0.6B")
    assert ref == BaseRef("Qwen/Qwen3-0.6B", None)
    with pytest.raises(ConfigError, match="fetches it first"):
        _ = ref.directory


@pytest.mark.parametrize(
    ("text", "cure"),
    [
        ("nonsense", "neither a directory nor a hub id"),
        ("a=", "NAME=PATH"),
        ("=/x", "NAME=PATH"),
        ("a=/no/such/place", "there is no directory"),
        ("/no/such/place", "there is no directory"),
        (":x=/no/such/place", "could not look for the tokenizer"),
        ("org/:x=/no/such/place", "could not look for the tokenizer"),
        ("a/b/c/d=/no/such/place", "name it model, org/model or org/model/variant"),
    ],
)
def test_what_is_no_model_is_refused(text: str, cure: str) -> None:
    with pytest.raises(ConfigError, match=cure):
        parse(text)


def test_the_same_weights_in_another_layout_do_not_count(model: Path) -> None:
    before = describe(parse(f"a={model}"))
    shutil.copyfile(model / "model.safetensors", model / "consolidated.safetensors")
    assert describe(parse(f"a={model}")) == before
    assert bases.weight_bytes(model, "stored", 2) == bases.weight_bytes(SHIPPED_PATH, "stored", 2)


def test_shards_are_those_of_the_index_and_all_of_them(model: Path) -> None:
    before = describe(parse(f"a={model}"))
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    with pytest.raises(ConfigError, match="no weights"):
        parse(f"a={model}")
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "model-00001-of-00001.safetensors"}}))
    assert describe(parse(f"a={model}")) == before
    index.write_text(json.dumps({"weight_map": {"x": "model-00001-of-00001.safetensors", "y": "other.safetensors"}}))
    with pytest.raises(ConfigError, match=r"lacks other\.safetensors"):
        parse(f"a={model}")
    index.write_text("[]")
    with pytest.raises(ConfigError, match=r"index\.json can't be read"):
        parse(f"a={model}")


def test_parameters_in_fewer_bits_count_as_what_they_stand_for(tmp_path: Path) -> None:
    """Memory and quotas of full fine-tuning are reckoned from it."""
    tensors = {
        "experts.down_proj_blocks": torch.zeros(2, 3, 4, 16, dtype=torch.uint8),
        "experts.down_proj_scales": torch.zeros(2, 3, 4, dtype=torch.uint8),
        "o_proj.weight": torch.zeros(8, 6, dtype=torch.float8_e4m3fn),
        "o_proj.weight_scale_inv": torch.zeros(2, 2),
        "norm.weight": torch.zeros(5),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    assert bases.num_params(tmp_path) == 2 * 3 * 4 * 32 + 8 * 6 + 5


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_an_incomplete_directory_says_what_it_lacks(model: Path, missing: str) -> None:
    (model / missing).unlink()
    with pytest.raises(ConfigError, match=missing if missing.endswith("json") else "weights"):
        parse(f"a={model}")


def test_names_are_distinct(model: Path) -> None:
    with pytest.raises(ConfigError, match="two models are called mine"):
        parse_all([str(model), f"mine={model}"])


def test_names_that_clients_look_for_tokenizers_by() -> None:
    names = ("org", "org/model/variant", "org/other:lora", "meta-llama/Llama-3.2-1B", "org/other")
    assert hub_names(names) == {
        **{name: name for name in names},
        "org/model": "org/model/variant",
        "thinkingmachineslabinc/meta-llama-3-instruct-tokenizer": "meta-llama/Llama-3.2-1B",
    }
    assert hub_name("org/other:lora") == "org/other"


def test_one_name_does_not_stand_for_two_tokenizers(model: Path) -> None:
    assert len(parse_all([f"org/model/a={model}", f"org/model/b={SHIPPED_PATH}"])) == 2
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps(tokenizer | {"other": 1}))
    with pytest.raises(ConfigError, match="under one name, org/model, and they differ"):
        parse_all([f"org/model/a={model}", f"org/model/b={SHIPPED_PATH}"])


def test_describe_reads_the_configs() -> None:
    info = describe(parse(SHIPPED_NAME))
    assert (info.arch, info.vocab_size, info.max_context, info.eos_tokens) == ("qwen3", 1024, 2048, (1000, 998))


def test_end_tokens_fall_back_to_the_config(model: Path) -> None:
    (model / "generation_config.json").unlink()
    assert describe(parse(f"a={model}")).eos_tokens == (1000,)


def test_a_nested_text_config_is_found(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    nested = {"model_type": "vlm", "text_config": config}
    (model / "config.json").write_text(json.dumps(nested))
    info = describe(parse(f"a={model}"))
    assert (info.arch, info.vocab_size) == ("vlm", 1024)


def test_a_broken_config_is_named(model: Path) -> None:
    (model / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json"):
        describe(parse(f"a={model}"))


def test_tokenizer_files_hold_no_weights() -> None:
    names = {file.name for file in tokenizer_files(SHIPPED_PATH)}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"} <= names
    assert not any(name.endswith((".safetensors", ".bin")) for name in names)


def test_parameters_are_counted_from_the_header(model: Path) -> None:
    assert bases.num_params(SHIPPED_PATH) * 2 < (SHIPPED_PATH / "model.safetensors").stat().st_size
    assert bases.num_params(SHIPPED_PATH) > 2_000_000
    (model / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ConfigError, match="not a whole safetensors file"):
        bases.num_params(model)


def test_a_hub_model_out_of_reach_names_the_cure() -> None:
    with pytest.raises(ConfigError, match="nobody/nothing=PATH"):
        hub.fetch(parse("nobody/nothing"), say=lambda text: None)


def test_a_local_model_is_not_fetched() -> None:
    assert hub.fetch(parse(SHIPPED_NAME), say=lambda text: None) == parse(SHIPPED_NAME)


REPOSITORY = ("config.json", "model.safetensors", "consolidated.safetensors", "original/model.safetensors")


class Repository:
    """A model on the hub, as `snapshot_download` sees it. downloaded: the names of each call's files."""

    def __init__(self, path: Path, *names: str) -> None:
        self._path, self._names = path, names
        self.downloaded: list[set[str]] = []

    def snapshot_download(self, name: str, **options: Any) -> object:
        patterns = {"allow_patterns": options["allow_patterns"], "ignore_patterns": options.get("ignore_patterns")}
        chosen = set(filter_repo_objects(self._names, **patterns))
        if options.get("local_files_only"):
            raise FileNotFoundError
        if options.get("dry_run"):
            sizes = {file: 3_000_000_000 * file.endswith("safetensors") for file in chosen}
            return [SimpleNamespace(filename=file, file_size=size, will_download=True) for file, size in sizes.items()]
        self.downloaded.append(chosen)
        return str(self._path)


def test_a_hub_model_is_announced_then_fetched(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = Repository(model, *REPOSITORY, "tokenizer.json", "tokenizer_config.json")
    said: list[str] = []
    monkeypatch.setattr(hub, "snapshot_download", repository.snapshot_download)
    assert hub.fetch(parse("org/model"), said.append) == BaseRef("org/model", model.resolve())
    assert said == ["downloading org/model from the Hugging Face hub: 3.00 GB"]
    assert repository.downloaded[-1] == {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}


@pytest.mark.parametrize(
    ("files", "message"),
    [(["tokenizer.model"], "only tokenizer.model"), (["vocab.json", "merges.txt"], "only vocab"), ([], "no tokenizer")],
)
def test_a_hub_model_without_a_tokenizer_is_refused_before_anything_is_downloaded(
    model: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], message: str
) -> None:
    repository = Repository(model, *REPOSITORY, *files)
    monkeypatch.setattr(hub, "snapshot_download", repository.snapshot_download)
    with pytest.raises(ConfigError, match=f"--base-model org/model: its repository has .*{message}.*org/model=DIR"):
        hub.fetch(parse("org/model"), pytest.fail)
    assert not repository.downloaded


def test_a_hub_model_whose_tokenizer_is_read_by_unknown_code_costs_no_weights(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model / "tokenizer.json").unlink()
    write_tokenizer(model, {}, auto_map={"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]})
    repository = Repository(model, *REPOSITORY, "tiktoken.model", "tokenizer_config.json", "tokenization_own.py")
    monkeypatch.setattr(hub, "snapshot_download", repository.snapshot_download)
    with pytest.raises(ConfigError, match=r"org/model: .*tokenization_own\.OwnTokenizer.*org/model=DIR"):
        hub.fetch(parse("org/model"), pytest.fail)
    assert repository.downloaded == [{"config.json", "tiktoken.model", "tokenizer_config.json"}]
