"""Adapters in the vision tower: what holds for the language model's holds for them, with runs that have none beside."""

from __future__ import annotations

import os
import shutil
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from tests.families.configs import PROCESSORS
from tests.families.gallery import SIZES, changed, plain_inputs, scenery, seeing, seeing_twin, with_pictures
from tests.families.test_battery import write_adapter
from tests.families.test_import import imported, tar_of_directory
from tests.families.twin import plain_model
from tests.numerics.lab import assert_same_bits, datum, grads, item, make_trainer, reader_of, relative, run_pass, spec
from tests.numerics.sampling_lab import assert_same_sample, make_sampler, run_all, sample, state_of
from tinsmith.bases.catalog import BaseRef, describe, text_model_type, weight_shapes
from tinsmith.export.adapter import read_adapter
from tinsmith.export.merge import merge
from tinsmith.export.peft_files import BaseShapes, write_peft
from tinsmith.files.checkpoint_file import dump_state, load_state
from tinsmith.machine import host_memory
from tinsmith.model import RowLayout
from tinsmith.types import Datum, Failure, RunId, RunSpec, SampleResult, Targets

BOUND = 1e-5
ALL = Targets(vision=True)
TOWER = Targets(attn=False, mlp=False, unembed=False, vision=True)
RUNS = (spec("a", 8, ALL), spec("b", 3, seed=2), spec("c", 4, TOWER, seed=3))


DENSE = [kind for kind in PROCESSORS if "moe" not in kind]
FEW = DENSE[:2]
IS_ALL = bool(os.environ.get("TINSMITH_TEST_TOWER"))  # `make tower`: every family in every test


@pytest.fixture(params=PROCESSORS if IS_ALL else FEW)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=PROCESSORS if IS_ALL else FEW[:1])
def sampled(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=DENSE if IS_ALL else FEW[:1])
def dense(request: pytest.FixtureRequest) -> str:
    """For what experts have no part in."""
    return request.param


@pytest.fixture(params=PROCESSORS if IS_ALL else FEW)
def exported(request: pytest.FixtureRequest) -> str:
    """Names differ from one to the other."""
    return request.param


def data_of(base, seed: int) -> list[Datum]:
    """With pictures, without any, and with one alone."""
    rng = np.random.default_rng(seed)
    return [seeing(base, seed, SIZES[:2], 16), datum(rng, 9), seeing(base, seed + 50, SIZES[:1], 6)]


def test_logprobs_and_gradients_are_those_of_peft(kind, make_base, within) -> None:
    """Of runs with all layers, without those of the tower and with these alone, in one pass."""
    base = make_base(kind)
    trainer = make_trainer(base, *RUNS, deterministic=False)
    items = [item(run.run_id, data_of(base, index)) for index, run in enumerate(RUNS)]
    results = run_pass(trainer, items)
    for run, one, result in zip(RUNS, items, results, strict=True):
        twin = seeing_twin(base, kind, trainer.export_run(run.run_id))
        total, logprobs = twin.backward(one.data)
        assert result.metrics["loss:sum"] == pytest.approx(total, rel=BOUND, abs=1e-3)
        for ours, theirs in zip(result.logprobs, logprobs, strict=True):
            within("logprobs with the tower's adapters", ours, theirs.numpy())
        ours = grads(trainer, run.run_id)
        assert run.targets.vision == any(linear.group == "vision" and f"grad/{linear.name}.lora_A" in ours
                                         for linear in base.linears)  # fmt: skip
        for name, parameter in twin.params.items():
            within("gradients with the tower's, relative", relative(ours[f"grad/{name}"], parameter.grad), 0.0)


@pytest.mark.parametrize("deterministic", [True, False])
def test_packed_is_as_alone(dense, make_base, within, deterministic: bool) -> None:
    """To the bit in deterministic mode, however a pass is cut; else within rounding."""
    base = make_base(dense, deterministic=deterministic)
    packed = make_trainer(base, *RUNS, deterministic=deterministic)
    items = [item(run.run_id, data_of(base, index)) for index, run in enumerate(RUNS)]
    results = run_pass(packed, items, max_tokens=160)
    for index, run in enumerate(RUNS):
        alone = make_trainer(base, run, deterministic=deterministic)
        (result,) = run_pass(alone, [items[index]], max_tokens=1)
        if deterministic:
            assert_same_bits(dict(enumerate(result.logprobs)), dict(enumerate(results[index].logprobs)))
            assert_same_bits(grads(alone, run.run_id), grads(packed, run.run_id))
            continue
        for one, other in zip(result.logprobs, results[index].logprobs, strict=True):
            within("packed and alone", one, other)
        gradients = {name: torch.from_numpy(gradient) for name, gradient in grads(packed, run.run_id).items()}
        for name, gradient in grads(alone, run.run_id).items():
            within("gradients, packed and alone, relative", relative(gradient, gradients[name]), 0.0)


def test_pictures_of_many_runs_are_looked_at_together(dense, make_base, monkeypatch) -> None:
    """One look for all of a pack, forward and back; those of runs without adapters there are looked at once for all."""
    base = make_base(dense)
    looks: list[int] = []
    through = type(base.eyes).look_through
    monkeypatch.setattr(type(base.eyes), "look_through", lambda eyes, context, pixels: (
        looks.append(len(pixels)), through(eyes, context, pixels))[1])  # fmt: skip
    trainer = make_trainer(base, *RUNS, deterministic=False)
    run_pass(trainer, [item(run.run_id, [seeing(base, 7)]) for run in RUNS])
    assert [num for num in looks if num > 1] == [2 * len(SIZES)] * 2
    looks.clear()
    run_pass(trainer, [item(run.run_id, [seeing(base, 7)], backward=False) for run in RUNS])
    assert looks == [2 * len(SIZES)]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_computing_layers_twice_changes_nothing(dense, make_base, dropout: float) -> None:
    base = make_base(dense)
    run = replace(RUNS[0], options=replace(RUNS[0].options, dropout=dropout))
    found = []
    for recompute in (False, True):
        trainer = make_trainer(base, run, deterministic=False)
        training_pass = trainer.start_pass([item("a", data_of(base, 0))])
        if recompute:
            training_pass._recomputed.update(training_pass._data)
        while training_pass.advance(1) is not None:
            pass
        training_pass.commit()
        found.append(grads(trainer, "a"))
    assert_same_bits(*found)
    plain = make_trainer(base, RUNS[0], deterministic=False)
    run_pass(plain, [item("a", data_of(base, 0))], max_tokens=1)
    name = next(f"grad/{linear.name}.lora_A" for linear in base.linears if linear.group == "vision")
    assert np.array_equal(found[0][name], grads(plain, "a")[name]) == (not dropout)


def test_samples_have_the_logprobs_of_the_trainer(sampled, make_base, within) -> None:
    """The same pictures through adapters of the tower and without, prompts of all decoded together."""
    base = make_base(sampled)
    states = {str(run.run_id): state_of(base, run) for run in RUNS}
    trainer = make_trainer(base, deterministic=False)
    for state in states.values():
        trainer.import_run(state.spec, state)
    items = []
    for index, name in enumerate("abcab"):
        tokens, pictures = scenery(base, 1 + index // 3, SIZES[: 3 - index // 3], 9)
        request = sample(f"r{index}", tokens, name, seed=index, max_tokens=20, prompt_logprobs=True)
        items.append(with_pictures(request, pictures))
    results = run_all(make_sampler(base, states), items)
    for request in items:
        result = results[request.op_id]
        tokens = np.concatenate([request.prompt, result.sequences[0].tokens])
        whole = Datum(tokens[:-1], {"target_tokens": tokens[1:].astype(np.int64)}, request.pictures)
        (forward,) = run_pass(trainer, [item(request.adapter, [whole], backward=False)])
        ours = np.concatenate([result.prompt_logprobs[1:], result.sequences[0].logprobs])
        within("sampler and trainer, with the tower's adapters", ours, forward.logprobs[0])


def differs(one: SampleResult, other: SampleResult, after: int) -> bool:
    differences = np.abs(one.prompt_logprobs[after + 1 :] - other.prompt_logprobs[after + 1 :])
    return bool(differences.max() > 1e-4 and (differences > 0).mean() > 0.9)


@pytest.mark.parametrize("deterministic", [True, False])
def test_what_is_known_of_a_picture_is_known_by_the_adapter(dense, make_base, deterministic: bool) -> None:
    """What was seen and computed through one isn't taken for another's, nor for the base's; the same one's is found."""
    base = make_base(dense, deterministic=deterministic)
    states = {name: state_of(base, spec(name, 4, TOWER, seed=seed)) for seed, name in enumerate("xy", 1)}
    tokens, pictures = scenery(base, 4, SIZES, 200)
    asks = {
        adapter: with_pictures(sample(f"r{adapter}", tokens, adapter, prompt_logprobs=True, max_tokens=3), pictures)
        for adapter in ("x", "y", None)
    }
    make = partial(make_sampler, base, states, deterministic=deterministic, prefill_chunk_tokens=64)
    sampler = make()
    found = {adapter: run_all(sampler, [ask])[ask.op_id] for adapter, ask in asks.items()}
    after = min(picture.end for picture in pictures)
    for one, other in (("x", "y"), ("x", None), ("y", None)):
        assert differs(found[one], found[other], after)
    looks = base.eyes.num_looks
    for adapter, ask in asks.items():
        again = run_all(sampler, [replace(ask, prompt_logprobs=False)])[ask.op_id]
        assert again.prompt_cache_hit_tokens > 64
        np.testing.assert_allclose(
            again.sequences[0].logprobs,
            found[adapter].sequences[0].logprobs,
            rtol=0,
            atol=0 if deterministic else BOUND,
        )
        other = [changed(pictures[0]), *pictures[1:]]
        unlike = run_all(sampler, [replace(ask, pictures=tuple(other))])[ask.op_id]
        assert differs(unlike, found[adapter], after)
    assert base.eyes.num_looks == looks + 3, "one changed picture each; the others are known"
    together = run_all(make(prefix_cache_mib=0), list(asks.values()))
    for adapter, ask in asks.items():
        if deterministic:
            assert_same_sample(together[ask.op_id], found[adapter])
        np.testing.assert_allclose(
            together[ask.op_id].prompt_logprobs[1:], found[adapter].prompt_logprobs[1:], rtol=0, atol=BOUND
        )


def test_a_bad_picture_fails_its_request_alone(dense, make_base, monkeypatch) -> None:
    base = make_base(dense)
    good, bad = seeing(base, 3), seeing(base, 12)
    cut = replace(bad.pictures[1], data=bad.pictures[1].data[: len(bad.pictures[1].data) // 2])
    trainer = make_trainer(base, *RUNS, deterministic=False)
    bad = replace(bad, pictures=(bad.pictures[0], cut, *bad.pictures[2:]))
    failed, done = run_pass(trainer, [item("a", [good, bad]), item("c", [good])])
    alone = make_trainer(base, RUNS[2], deterministic=False)
    (expected,) = run_pass(alone, [item("c", [good])])
    assert isinstance(failed, Failure)
    assert failed.message.startswith("datum 1: ")
    assert not any(gradient.any() for gradient in grads(trainer, "a").values())
    np.testing.assert_allclose(done.logprobs[0], expected.logprobs[0], rtol=0, atol=BOUND)
    for name, gradient in grads(alone, "c").items():
        assert relative(gradient, torch.from_numpy(grads(trainer, "c")[name])) < BOUND

    num = sum(picture.num_tokens for picture in good.pictures)
    between = num * (base.eyes.look_bytes + base.eyes._bytes_with_gradients()) / 2
    monkeypatch.setattr(host_memory, "available_bytes", lambda: int(between))
    failed, looked = run_pass(trainer, [item("a", [good]), item("c", [good], backward=False)])
    assert failed.code == "out_of_memory", "gradients take more than looking"
    assert not isinstance(looked, Failure)


def test_a_request_that_is_taken_back_leaves_no_gradient(dense, make_base) -> None:
    """Its last datum makes no finite loss, after gradients of others were added in packs before."""
    base = make_base(dense)
    broken = seeing(base, 6)
    broken.inputs["weights"][:] = np.float32("inf")
    trainer = make_trainer(base, RUNS[0], deterministic=False)
    before = item("a", [seeing(base, 1)])
    run_pass(trainer, [before])
    expected = grads(trainer, "a")
    (failed,) = run_pass(trainer, [item("a", [seeing(base, 2), seeing(base, 3), broken], seq=2)], max_tokens=1)
    assert isinstance(failed, Failure)
    assert_same_bits(expected, grads(trainer, "a"))


def test_a_state_comes_back_as_it_was(dense, make_base) -> None:
    base = make_base(dense)
    trainer = make_trainer(base, RUNS[0], deterministic=False)
    run_pass(trainer, [item("a", data_of(base, 0))])
    state = trainer.export_run(RunId("a"))
    other = make_trainer(base, deterministic=False)
    other.import_run(RUNS[0], load_state(dump_state(state)))
    assert_same_bits(state.tensors, other.export_run(RunId("a")).tensors)
    assert trainer.run_bytes(RUNS[0]) == 16 * sum(
        array.size for name, array in state.tensors.items() if name.startswith("param/")
    )


@pytest.mark.parametrize("targets", [ALL, TOWER, Targets(attn=False, vision=True)] if IS_ALL else [ALL, TOWER])
def test_exported_it_is_the_same_elsewhere(exported, make_base, tmp_path: Path, within, targets: Targets) -> None:
    """In `peft`, merged into a whole model, and back in a run, to the bit."""
    base = make_base(exported)
    trainer = make_trainer(base, spec("a", 8, targets), deterministic=False)
    one = seeing(base, 1)
    (result,) = run_pass(trainer, [item("a", [one], backward=False)])
    own, out = tmp_path / "own", tmp_path / "peft"
    own.mkdir()
    out.mkdir()
    write_adapter(base, trainer, own)
    path = Path(base.info.path)
    write_peft(read_adapter(own), out, BaseShapes(weight_shapes(path), text_model_type(path)))
    inputs = plain_inputs(base, exported, one.tokens, one.pictures)
    targets_N1 = torch.from_numpy(one.inputs["target_tokens"])[:, None]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message=".*tie")
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys")  # of experts
        model = PeftModel.from_pretrained(plain_model(base), out).double()
        logprobs = model(**inputs).logits[0].log_softmax(-1).gather(1, targets_N1)[:, 0]
    within("exported with the tower's, in peft", result.logprobs[0], logprobs.numpy())
    ours = {linear.name for linear in base.linears if linear.is_targeted(targets) and not linear.is_of_experts}
    wrapped = {
        name.removeprefix("base_model.model.") for name, module in model.named_modules() if hasattr(module, "lora_A")
    }
    theirs = {"lm_head" if name.endswith(".lm_head") else name for name in wrapped if ".experts" not in name}
    assert theirs == ours, "no layer more and none less"

    merge(path, read_adapter(own), tmp_path / "merged")
    model, report = reader_of(base).from_pretrained(
        tmp_path / "merged",
        dtype=torch.float64,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        logprobs = model(**inputs).logits[0].log_softmax(-1).gather(1, targets_N1)[:, 0]
    within("merged with the tower's, in transformers", result.logprobs[0], logprobs.numpy())

    for directory in (own, out):
        state = imported(base, tar_of_directory(directory))
        assert state.spec.targets == targets
        assert_same_bits(trainer.export_run(RunId("a"), ("param",)).tensors, state.tensors)


def test_the_api_knows_the_size_of_an_adapter(kind, make_base) -> None:
    base = make_base(kind)
    info = describe(BaseRef("x", Path(base.info.path)))
    for targets in (ALL, TOWER, Targets(attn=False, vision=True)):
        asked = RunSpec(RunId("r"), "x", rank=3, targets=targets)
        assert info.adapter_bytes(asked) == 4 * RowLayout(base.linears, targets, 3).num_params


def test_the_language_models_part_begins_as_without_the_tower(dense, make_base) -> None:
    """From one seed."""
    base = make_base(dense)
    plain, both = (make_trainer(base) for _ in range(2))
    plain.create_run(spec("a", 8))
    both.create_run(spec("a", 8, ALL))
    expected, found = (trainer.export_run(RunId("a"), ("param",)).tensors for trainer in (plain, both))
    assert_same_bits(expected, {name: found[name] for name in expected})


def test_names_of_older_releases_are_known(make_base, tmp_path: Path) -> None:
    """Gemma 3's tower as directories on the hub have it, and adapters that were trained on such."""
    base = make_base("gemma3_vl")
    trainer = make_trainer(base, RUNS[0], deterministic=False)
    own, older, hub = tmp_path / "own", tmp_path / "older", tmp_path / "hub"
    own.mkdir()
    write_adapter(base, trainer, own)
    shutil.copytree(own, older)
    shutil.copytree(base.info.path, hub)
    for path in (older / "adapter_model.safetensors", hub / "model.safetensors"):
        renamed = {
            name.replace("vision_tower.", "vision_tower.vision_model."): t for name, t in load_file(path).items()
        }
        save_file(renamed, path, {"format": "pt"})
    assert describe(BaseRef("x", hub)).layer_widths == describe(BaseRef("x", Path(base.info.path))).layer_widths
    _, report = reader_of(base).from_pretrained(hub, output_loading_info=True)
    assert not report["missing_keys"]
    state = imported(base, tar_of_directory(older))
    assert_same_bits(trainer.export_run(RunId("a"), ("param",)).tensors, state.tensors)
    changed_names = merge(hub, read_adapter(own), tmp_path / "of_hub")
    merge(Path(base.info.path), read_adapter(own), tmp_path / "of_own")
    assert sum("vision_tower.vision_model." in name for name in changed_names) == 12
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("of_hub", "of_own"))
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name.replace("vision_tower.vision_model.", "vision_tower.")])
