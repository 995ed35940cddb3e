"""Adapters written for others: what is read, what is refused, shards, dtypes, and the command."""

from __future__ import annotations

import io
import json
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tinsmith.cli import main as cli
from tinsmith.errors import ConfigError, UserError
from tinsmith.export.adapter import read_adapter, unpack
from tinsmith.export.merge import merge
from tinsmith.export.peft_files import write_peft

LAYER = "model.layers.0.mlp.up_proj"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none"}


def write(directory: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    return directory


def halves(module: str, outputs: int = 6, inputs: int = 4, rank: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(module))
    return {
        f"base_model.model.{module}.lora_A.weight": torch.randn(rank, inputs, generator=generator),
        f"base_model.model.{module}.lora_B.weight": torch.randn(outputs, rank, generator=generator),
    }


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write(tmp_path / "adapter", {**halves(LAYER), **halves("model.unembed_tokens", 5)})


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Two shards, a tied head, a tensor that isn't a weight in floating point."""
    directory = tmp_path / "base"
    directory.mkdir()
    first = {f"{LAYER}.weight": torch.randn(6, 4).bfloat16(), "model.norm.weight": torch.ones(4)}
    second = {"model.embed_tokens.weight": torch.randn(5, 4), "model.places": torch.arange(3)}
    save_file(first, directory / "model-00001-of-00002.safetensors")
    save_file(second, directory / "model-00002-of-00002.safetensors")
    places = {name: f"model-0000{n}-of-00002.safetensors" for n, part in enumerate((first, second), 1) for name in part}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (directory / "config.json").write_text(json.dumps({"tie_word_embeddings": True, "dtype": "bfloat16"}))
    (directory / "tokenizer.json").write_text("{}")
    return directory


def test_a_merge_keeps_shards_and_all_else(adapter: Path, base: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    out = tmp_path / "out"
    changed = merge(base, read_adapter(adapter), out, progress=lambda done, total: told.append((done, total)))
    assert changed == ["lm_head.weight", f"{LAYER}.weight"]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["lm_head.weight"] == "model-00002-of-00002.safetensors"
    assert told[-1] == (index["metadata"]["total_size"],) * 2
    before = {name: t for shard in sorted(base.glob("*.safetensors")) for name, t in load_file(shard).items()}
    after = {name: t for shard in sorted(out.glob("*.safetensors")) for name, t in load_file(shard).items()}
    factors = load_file(adapter / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.{LAYER}.lora_{half}.weight"] for half in "AB")
    expected = (before[f"{LAYER}.weight"].float() + 2.0 * b @ a).bfloat16()
    torch.testing.assert_close(after.pop(f"{LAYER}.weight"), expected, rtol=0, atol=0)
    a, b = (factors[f"base_model.model.model.unembed_tokens.lora_{half}.weight"] for half in "AB")
    torch.testing.assert_close(after.pop("lm_head.weight"), before["model.embed_tokens.weight"] + 2.0 * b @ a)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert json.loads((out / "config.json").read_text()) == {"tie_word_embeddings": False, "dtype": "bfloat16"}
    assert (out / "tokenizer.json").is_file()


def test_a_trained_head_is_untied_where_a_tied_base_holds_one(adapter: Path, base: Path, tmp_path: Path) -> None:
    """Readers that go by `tie_word_embeddings` would take the embedding for it."""
    path = base / "model-00002-of-00002.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path)
    out = tmp_path / "out"
    merge(base, read_adapter(adapter), out)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    merged = load_file(out / path.name)
    assert torch.equal(merged["model.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert not torch.equal(merged["lm_head.weight"], tensors["model.embed_tokens.weight"])


def test_the_same_weights_in_another_layout_are_left_alone(adapter: Path, base: Path, tmp_path: Path) -> None:
    """As Mistral's directories have them: a merged model beside unmerged weights would be two models."""
    save_file({"output.weight": torch.randn(5, 4)}, base / "consolidated.safetensors")
    (base / "consolidated.safetensors.index.json").write_text("{}")
    out = tmp_path / "out"
    assert "lm_head.weight" in merge(base, read_adapter(adapter), out)
    assert not [path.name for path in out.iterdir() if path.name.startswith("consolidated")]
    assert "output.weight" not in json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]


def test_another_dtype_is_of_all_weights(adapter: Path, base: Path, tmp_path: Path) -> None:
    merge(base, read_adapter(adapter), tmp_path / "out", dtype="float16")
    tensors = {n: t for shard in (tmp_path / "out").glob("*.safetensors") for n, t in load_file(shard).items()}
    assert {tensor.dtype for name, tensor in tensors.items() if name != "model.places"} == {torch.float16}
    assert tensors["model.places"].dtype == torch.int64
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"


def test_rank_stabilised_adapters_have_their_own_scale(tmp_path: Path) -> None:
    """arXiv 2312.03732: alpha / sqrt(rank)."""
    found = read_adapter(write(tmp_path / "a", halves(LAYER), use_rslora=True))
    assert found.scale(LAYER) == pytest.approx(4 / 2**0.5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tensors": {"base_model.model.x.lora_A.weight": torch.zeros(1, 1)}}, "without its other half"),
        ({"tensors": {"base_model.model.x.lora_B.weight": torch.zeros(1, 1)}}, "without its other half"),
        ({"tensors": {"base_model.model.x.bias": torch.zeros(1)}}, "a bias"),
        ({"tensors": {}}, "holds no adapter"),
        ({"tensors": halves("model.layers.0.mlp.experts.w1")}, "tinsmith import"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"peft_type": "IA3"}, "does not describe a LoRA adapter"),
        ({"r": 0}, "r must be"),
    ],
)
def test_what_can_t_be_carried_is_refused_by_name(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    tensors = change.pop("tensors", halves(LAYER))
    with pytest.raises(UserError, match=words):
        read_adapter(write(tmp_path / "a", tensors, **change))


@pytest.mark.parametrize("tensors", [halves("model.layers.7.mlp.up_proj"), halves(LAYER, 7)])
def test_an_adapter_of_another_model_leaves_nothing_behind(
    tensors: dict[str, torch.Tensor], base: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="of another model"):
        merge(base, read_adapter(write(tmp_path / "a", tensors)), tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_a_directory_that_is_there_is_not_written_to(adapter: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exists"):
        merge(base, read_adapter(adapter), tmp_path / "adapter")


def test_peft_finds_the_head_under_its_own_name(adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_peft(read_adapter(adapter), out)
    before, after = (load_file(path / "adapter_model.safetensors") for path in (adapter, out))
    assert after.keys() == {name.replace("model.unembed_tokens", "lm_head") for name in before}
    assert all(torch.equal(t, after[n.replace("model.unembed_tokens", "lm_head")]) for n, t in before.items())


def tar_of(adapter: Path) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for path in adapter.iterdir():
            tar.add(path, path.name)
    return stream.getvalue()


def test_a_tar_gives_its_two_files_and_nothing_else(adapter: Path, tmp_path: Path) -> None:
    (adapter / "more").write_text("x")
    (tmp_path / "a.tar").write_bytes(tar_of(adapter))
    into = tmp_path / "into"
    into.mkdir()
    unpack(tmp_path / "a.tar", into)
    assert sorted(path.name for path in into.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    (adapter / "adapter_config.json").unlink()
    (tmp_path / "b.tar").write_bytes(tar_of(adapter))
    with pytest.raises(UserError, match=r"lacks adapter_config\.json"):
        unpack(tmp_path / "b.tar", into)
    (adapter / "model.safetensors").write_text("x")
    (tmp_path / "full.tar").write_bytes(tar_of(adapter))
    with pytest.raises(UserError, match="export it with --format hf"):
        unpack(tmp_path / "full.tar", into)
    (tmp_path / "c.tar").write_bytes(b"no tar at all")
    with pytest.raises(UserError, match="not a tar"):
        unpack(tmp_path / "c.tar", into)


@pytest.fixture
def served(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A server that hands out the adapter's tar by a link of its own, which is JSON for who accepts that, as the real
    one does; what it was asked for."""
    asked: list[str] = []
    content = tar_of(adapter)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            if self.path != "/link" and "json" in self.headers["Accept"]:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b'{"url": "/link"}')
                return
            if self.path != "/link":
                self.send_response(302)
                self.send_header("Location", "/link")
                self.end_headers()
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("TINKER_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("TINKER_API_KEY", "tml-x")
    yield asked
    server.shutdown()
    thread.join()
    server.server_close()


def run(*args: object) -> Any:
    return CliRunner().invoke(cli.app, [str(arg) for arg in args], catch_exceptions=False)


def test_a_checkpoint_is_fetched_and_merged(served: list[str], base: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    done = run("export", "tinker://r1/weights/a", "--format", "hf", "--base", base, "--out", out)
    assert done.exit_code == 0
    assert "2 changed weights" in done.stdout
    assert served == ["/api/v1/training_runs/r1/checkpoints/weights/a/archive", "/link"]
    assert (out / "config.json").is_file()


def test_a_directory_is_written_as_an_adapter(adapter: Path, tmp_path: Path) -> None:
    done = run("export", adapter, "--out", tmp_path / "peft")
    assert done.exit_code == 0
    assert "an adapter of 2 layers" in done.stdout
    assert read_adapter(tmp_path / "peft").names.keys() == {LAYER, "lm_head"}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--format", "hf"), "--base"),
        (("--dtype", "float16"), "--format hf"),
        (("--out", "."), "exists"),
    ],
)
def test_a_wrong_call_is_told_what_to_do(more: tuple[str, ...], words: str, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        run("export", adapter, "--out", tmp_path / "new", *more)
