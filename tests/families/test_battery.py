"""What holds for every family that is served, on a small random configuration of its real architecture."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from tests.families.configs import CONFIGS, VOCAB
from tests.families.twin import MergedTwin, own_config, plain_model
from tests.numerics.lab import (
    PeftTwin,
    assert_same_bits,
    datum,
    grads,
    item,
    make_trainer,
    reader_of,
    relative,
    run_pass,
    spec,
)
from tests.numerics.sampling_lab import assert_same_sample, make_sampler, prompt, run_all, sample, state_of
from tinsmith.bases.catalog import BaseRef, describe, text_model_type, weight_shapes
from tinsmith.export.adapter import read_adapter
from tinsmith.export.merge import merge
from tinsmith.export.peft_files import BaseShapes, write_peft
from tinsmith.files.adapter_files import adapter_files
from tinsmith.files.checkpoint_file import dump_state, load_state, read_state_header
from tinsmith.model import BaseModel
from tinsmith.training import Trainer
from tinsmith.types import AdamParams, BaseInfo, Datum, OpId, OptimItem, OptimResult, RunId, RunState, Targets

BOUND = 1e-5
LENGTHS = (7, 40, 66)
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
RUNS = (
    spec("a", 8),
    spec("b", 3, Targets(attn=True, mlp=False, unembed=False), seed=2),
    spec("c", 16, Targets(attn=False, mlp=True, unembed=True), seed=3),
)


@pytest.fixture(params=CONFIGS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def data_of(seed: int) -> list[Datum]:
    rng = np.random.default_rng(seed)
    return [datum(rng, length) for length in LENGTHS]


def has_experts(base: BaseModel) -> bool:
    return any(linear.is_of_experts for linear in base.linears)


def twin_of(base: BaseModel, state: RunState) -> MergedTwin | PeftTwin:
    return MergedTwin(base, state) if has_experts(base) else PeftTwin(base, state)


def test_logprobs_without_an_adapter_are_those_of_transformers(kind, make_base, plain, within) -> None:
    base = make_base(kind)
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, VOCAB, 130)
    request = sample("r", tokens, prompt_logprobs=True, max_tokens=1)
    result = run_all(make_sampler(base), [request])["r"]
    with torch.no_grad():
        expected = plain(base)(input_ids=torch.from_numpy(tokens)[None]).logits[0].log_softmax(-1).numpy()
    within("logprobs of the base", result.prompt_logprobs[1:], expected[np.arange(129), tokens[1:]])


def test_logprobs_and_gradients_are_those_of_peft(kind, make_base, within) -> None:
    base = make_base(kind)
    trainer = make_trainer(base, *RUNS, deterministic=False)
    items = [item(run.run_id, data_of(index)) for index, run in enumerate(RUNS)]
    results = run_pass(trainer, items)
    for run, one, result in zip(RUNS, items, results, strict=True):
        state = trainer.export_run(run.run_id)
        twin = twin_of(base, state)
        total, logprobs = twin.backward(one.data)
        assert result.metrics["loss:sum"] == pytest.approx(total, rel=BOUND, abs=1e-3)
        for ours, theirs in zip(result.logprobs, logprobs, strict=True):
            within("logprobs with adapters", ours, theirs.numpy())
        ours = grads(trainer, run.run_id)
        for name, parameter in twin.params.items():
            within("gradients, relative", relative(ours[f"grad/{name}"], parameter.grad), 0.0)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_GPU])])
def test_a_step_is_that_of_torchs_adamw(kind, make_base, within, device: str) -> None:
    """Two passes and a step. With a large epsilon: with a small one the last bits of a gradient near zero decide."""
    base = make_base(kind)
    own = base if device == "cpu" else make_base(kind, device=device)
    trainer = make_trainer(own, RUNS[0], deterministic=False)
    twin = twin_of(base, trainer.export_run(RunId("a")))
    for seed in (0, 1):
        run_pass(trainer, [item("a", data_of(seed), seq=seed)])
    twin.backward([*data_of(0), *data_of(1)])
    params = AdamParams(learning_rate=0.2, eps=5.0, weight_decay=0.3)
    (outcome,) = trainer.optim_step([OptimItem(OpId("o"), RunId("a"), params)])
    assert isinstance(outcome, OptimResult)
    torch.optim.AdamW(
        twin.params.values(), lr=0.2, betas=(params.beta1, params.beta2), eps=5.0, weight_decay=0.3
    ).step()
    ours = trainer.export_run(RunId("a")).tensors
    for name, theirs in twin.params.items():
        difference = relative(ours[f"param/{name}"], theirs.detach())
        if device == "cpu":
            within("weights after a step, relative", difference, 0.0)
        assert difference < 1e-3, "products on a GPU may round to fewer bits"


@pytest.mark.parametrize("deterministic", [True, False])
def test_packed_is_as_alone(kind, make_base, within, deterministic: bool) -> None:
    """To the bit in deterministic mode, however a pass is cut; else within rounding."""
    base = make_base(kind, deterministic=deterministic)
    packed = make_trainer(base, *RUNS, deterministic=deterministic)
    results = run_pass(packed, [item(run.run_id, data_of(index)) for index, run in enumerate(RUNS)], max_tokens=100)
    for index, run in enumerate(RUNS):
        alone = make_trainer(base, run, deterministic=deterministic)
        (result,) = run_pass(alone, [item(run.run_id, data_of(index))])
        if deterministic:
            assert_same_bits(dict(enumerate(result.logprobs)), dict(enumerate(results[index].logprobs)))
            assert_same_bits(grads(alone, run.run_id), grads(packed, run.run_id))
            continue
        for one, other in zip(result.logprobs, results[index].logprobs, strict=True):
            within("packed and alone", one, other)
        gradients = {name: torch.from_numpy(gradient) for name, gradient in grads(packed, run.run_id).items()}
        for name, gradient in grads(alone, run.run_id).items():
            within("gradients, packed and alone, relative", relative(gradient, gradients[name]), 0.0)


def test_computing_layers_twice_changes_nothing(kind, make_base) -> None:
    base = make_base(kind)
    found = []
    for recompute in (False, True):
        trainer = make_trainer(base, RUNS[0], deterministic=False)
        training_pass = trainer.start_pass([item("a", data_of(0))])
        if recompute:
            training_pass._recomputed.update(training_pass._data)
        while training_pass.advance(30) is not None:
            pass
        training_pass.commit()
        found.append(grads(trainer, "a"))
    assert_same_bits(*found)


def test_samples_have_the_logprobs_of_the_trainer(kind, make_base, within) -> None:
    """Ragged prompts of several adapters, decoded together beyond windows and blocks."""
    base = make_base(kind)
    states = {f"run{i}": state_of(base, spec(f"run{i}", 4 * (i + 1), seed=i + 1)) for i in range(3)}
    trainer = make_trainer(base, deterministic=False)
    for state in states.values():
        trainer.import_run(state.spec, state)
    items = [
        sample(
            f"r{i}", prompt(i, (3, 20, 70)[i % 3], VOCAB), f"run{i % 3}", seed=i, max_tokens=40, prompt_logprobs=True
        )
        for i in range(6)
    ]
    results = run_all(make_sampler(base, states), items)
    for index, request in enumerate(items):
        result = results[request.op_id]
        tokens = np.concatenate([request.prompt, result.sequences[0].tokens])
        whole = Datum(tokens[:-1].astype(np.int32), {"target_tokens": tokens[1:].astype(np.int64)})
        (forward,) = run_pass(trainer, [item(f"run{index % 3}", [whole], seq=index, backward=False)])
        ours = np.concatenate([result.prompt_logprobs[1:], result.sequences[0].logprobs])
        within("sampler and trainer", ours, forward.logprobs[0])


def test_a_prompt_in_chunks_is_as_the_whole(kind, make_base, within) -> None:
    base = make_base(kind)
    request = sample("r", prompt(3, 150, VOCAB), "a", prompt_logprobs=True, max_tokens=5, temperature=0.0)
    states = {"a": state_of(base, spec("a"))}
    whole, cut = (
        run_all(make_sampler(base, states, prefill_chunk_tokens=chunk), [request])["r"] for chunk in (4096, 16)
    )
    within("chunks and whole", cut.prompt_logprobs[1:], whole.prompt_logprobs[1:])
    np.testing.assert_array_equal(whole.sequences[0].tokens, cut.sequences[0].tokens)


def test_a_sample_among_others_has_the_bits_of_one_alone(kind, make_base) -> None:
    """In deterministic mode, also where prompts come in chunks."""
    base = make_base(kind, deterministic=True)
    states = {f"a{i}": state_of(base, spec(f"a{i}", 4 * (i + 1), seed=i + 1)) for i in range(3)}
    items = [
        sample(f"r{i}", prompt(i, (2, 17, 65, 140)[i % 4], VOCAB), f"a{i % 3}", seed=i, max_tokens=5 + 4 * i)
        for i in range(8)
    ]
    settings = {"deterministic": True, "prefill_chunk_tokens": 32}
    together = run_all(make_sampler(base, states, **settings), items)
    for one in (items[i] for i in (0, 1, 2, 7)):  # each prompt, each adapter, the longest
        assert_same_sample(run_all(make_sampler(base, states, **settings), [one])[one.op_id], together[one.op_id])


def test_a_state_comes_back_as_it_was(kind, make_base) -> None:
    base = make_base(kind)
    trainer = make_trainer(base, RUNS[0], deterministic=False)
    run_pass(trainer, [item("a", data_of(0))])
    state = trainer.export_run(RunId("a"))
    other = make_trainer(base, deterministic=False)
    other.import_run(RUNS[0], load_state(dump_state(state)))
    assert_same_bits(state.tensors, other.export_run(RunId("a")).tensors)


def write_adapter(base: BaseModel, trainer: Trainer, directory: Path) -> BaseInfo:
    """The archive's two files of the run "a"."""
    if not Path(base.info.path, "tokenizer.json").is_file():
        Path(base.info.path, "tokenizer.json").write_text("{}")
    info = describe(BaseRef(base.info.name, Path(base.info.path)))
    source = io.BytesIO(dump_state(trainer.export_run(RunId("a"))))
    for name, file in adapter_files(read_state_header(source), info).items():
        (directory / name).write_bytes(b"".join(file.read(source)))
    return info


def test_the_merged_model_is_the_same_in_transformers(kind, make_base, tmp_path: Path, within) -> None:
    """A head that was tied and trained has weights of its own then; the embedding is as it was."""
    base = make_base(kind)
    trainer = make_trainer(base, RUNS[0], deterministic=False)
    (result,) = run_pass(trainer, [item("a", data_of(1), backward=False)])
    write_adapter(base, trainer, tmp_path)
    merge(Path(base.info.path), read_adapter(tmp_path), tmp_path / "merged")
    model, report = reader_of(base).from_pretrained(
        tmp_path / "merged", dtype=torch.float64, attn_implementation="eager", experts_implementation="eager",
        output_loading_info=True, **own_config(base),
    )  # fmt: skip
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for one, ours in zip(data_of(1), result.logprobs, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(one.tokens.astype(np.int64))[None]).logits[0].log_softmax(-1)
        theirs = logits.gather(1, torch.from_numpy(one.inputs["target_tokens"])[:, None])[:, 0]
        within("merged, in transformers", ours, theirs.numpy())


def test_the_exported_adapter_is_the_same_in_peft(kind, make_base, tmp_path: Path, within) -> None:
    """As `tinsmith export --format peft` writes it; of experts too, as the base has them on disk."""
    base = make_base(kind)
    trainer = make_trainer(base, RUNS[0], deterministic=False)
    (result,) = run_pass(trainer, [item("a", data_of(1), backward=False)])
    own, out = tmp_path / "own", tmp_path / "peft"
    own.mkdir()
    out.mkdir()
    write_adapter(base, trainer, own)
    path = Path(base.info.path)
    write_peft(read_adapter(own), out, BaseShapes(weight_shapes(path), text_model_type(path)))
    model = plain_model(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message=".*tie")
        warnings.filterwarnings(
            "ignore", message="The following (rank|alpha)_pattern keys"
        )  # peft looks at modules alone
        model = PeftModel.from_pretrained(model, out).double()
    for one, ours in zip(data_of(1), result.logprobs, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(one.tokens.astype(np.int64))[None]).logits[0].log_softmax(-1)
        theirs = logits.gather(1, torch.from_numpy(one.inputs["target_tokens"])[:, None])[:, 0]
        within("exported, in peft", ours, theirs.numpy())
