"""What holds for every family with vision: the battery's promises for sequences with pictures among their tokens."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from tests.families.configs import COMMON, IMAGE, PROCESSORS, VOCAB
from tests.families.gallery import SIZES, changed, plain_inputs, scenery, seeing, seeing_twin, with_pictures
from tests.numerics.graph_lab import Recorder, tables_in_use
from tests.numerics.lab import assert_same_bits, datum, grads, item, make_trainer, relative, run_pass, spec
from tests.numerics.sampling_lab import (
    Letters,
    assert_same_sample,
    make_sampler,
    prompt,
    run_all,
    sample,
    state_of,
    with_blocks,
)
from tinsmith.bases.catalog import BaseRef, describe
from tinsmith.config import Settings
from tinsmith.errors import UnsupportedError
from tinsmith.machine import host_memory
from tinsmith.model import RowLayout, load_base
from tinsmith.model.vision.trial import noise
from tinsmith.pictures import Picture
from tinsmith.sampling import Sampler
from tinsmith.types import BaseInfo, Datum, Failure, RunId, RunSpec, Targets

BOUND = 1e-5
RUNS = (spec("a", 8), spec("b", 3, Targets(attn=True, mlp=False, unembed=False), seed=2))


@pytest.fixture(params=PROCESSORS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[kind for kind in PROCESSORS if "moe" not in kind])
def dense(request: pytest.FixtureRequest) -> str:
    """For what experts have no part in."""
    return request.param


def data_of(base, seed: int) -> list[Datum]:
    """With pictures, without any, and with one alone."""
    rng = np.random.default_rng(seed)
    return [seeing(base, seed), datum(rng, 33), seeing(base, seed + 50, SIZES[:1], 6)]


def test_logprobs_are_those_of_transformers(kind, make_base, plain, within) -> None:
    base = make_base(kind)
    tokens, pictures = scenery(base, 1, SIZES, 40)
    request = with_pictures(sample("r", tokens, prompt_logprobs=True, max_tokens=1), pictures)
    result = run_all(make_sampler(base), [request])["r"]
    with torch.no_grad():
        logits = plain(base)(**plain_inputs(base, kind, tokens, pictures)).logits[0]
    expected = logits.log_softmax(-1).numpy()[np.arange(len(tokens) - 1), tokens[1:]]
    within("logprobs with pictures", result.prompt_logprobs[1:], expected)


def test_logprobs_and_gradients_are_those_of_peft(kind, make_base, within) -> None:
    base = make_base(kind)
    trainer = make_trainer(base, *RUNS, deterministic=False)
    items = [item(run.run_id, data_of(base, index)) for index, run in enumerate(RUNS)]
    results = run_pass(trainer, items)
    for run, one, result in zip(RUNS, items, results, strict=True):
        twin = seeing_twin(base, kind, trainer.export_run(run.run_id))
        total, logprobs = twin.backward(one.data)
        assert result.metrics["loss:sum"] == pytest.approx(total, rel=BOUND, abs=1e-3)
        for ours, theirs in zip(result.logprobs, logprobs, strict=True):
            within("logprobs with pictures", ours, theirs.numpy())
        ours = grads(trainer, run.run_id)
        for name, parameter in twin.params.items():
            within("gradients with pictures, relative", relative(ours[f"grad/{name}"], parameter.grad), 0.0)


def test_packed_is_as_alone(kind, make_base) -> None:
    """To the bit: those with pictures, those without, and all of them without any neighbour that has one."""
    base = make_base(kind, deterministic=True)
    packed = make_trainer(base, *RUNS)
    items = [item(run.run_id, data_of(base, index)) for index, run in enumerate(RUNS)]
    results = run_pass(packed, items, max_tokens=160)
    for index, run in enumerate(RUNS):
        alone = make_trainer(base, run)
        (result,) = run_pass(alone, [items[index]], max_tokens=1)
        assert_same_bits(dict(enumerate(result.logprobs)), dict(enumerate(results[index].logprobs)))
        assert_same_bits(grads(alone, run.run_id), grads(packed, run.run_id))


def test_computing_layers_twice_changes_nothing(kind, make_base) -> None:
    base = make_base(kind)
    found = []
    for recompute in (False, True):
        trainer = make_trainer(base, RUNS[0], deterministic=False)
        training_pass = trainer.start_pass([item("a", data_of(base, 0))])
        if recompute:
            training_pass._recomputed.update(training_pass._data)
        while training_pass.advance(1) is not None:
            pass
        training_pass.commit()
        found.append(grads(trainer, "a"))
    assert_same_bits(*found)


def test_samples_have_the_logprobs_of_the_trainer(kind, make_base, within) -> None:
    """Prompts with many pictures, one and none are decoded together."""
    base = make_base(kind)
    states = {run.run_id: state_of(base, run) for run in RUNS}
    trainer = make_trainer(base, deterministic=False)
    for state in states.values():
        trainer.import_run(state.spec, state)
    items = []
    for index, sizes in enumerate((SIZES, SIZES[:1], ())):
        tokens, pictures = scenery(base, index, sizes, 9)
        request = sample(f"r{index}", tokens, "ab"[index % 2], seed=index, max_tokens=60, prompt_logprobs=True)
        items.append(with_pictures(request, pictures))
    results = run_all(make_sampler(base, states), items)
    for request in items:
        result = results[request.op_id]
        tokens = np.concatenate([request.prompt, result.sequences[0].tokens])
        whole = Datum(tokens[:-1], {"target_tokens": tokens[1:].astype(np.int64)}, request.pictures)
        (forward,) = run_pass(trainer, [item(request.adapter, [whole], backward=False)])
        ours = np.concatenate([result.prompt_logprobs[1:], result.sequences[0].logprobs])
        within("sampler and trainer", ours, forward.logprobs[0])


@pytest.mark.parametrize("deterministic", [False, True])
def test_chunks_and_prefixes_are_as_the_whole(dense, make_base, within, deterministic: bool) -> None:
    """Wherever a prompt is cut, and wherever what is known of it ends: before a picture, in it or behind it."""
    base = make_base(dense, deterministic=deterministic)
    tokens, pictures = scenery(base, 4, (*SIZES, *SIZES), 70)
    scored = with_pictures(sample("r", tokens, prompt_logprobs=True, max_tokens=1), pictures)
    ask = with_pictures(sample("s", tokens, max_tokens=6, temperature=0.0), pictures)
    make = partial(make_sampler, base, deterministic=deterministic, prefix_cache_mib=64)
    whole, *cut = (run_all(make(prefill_chunk_tokens=chunk), [scored, ask]) for chunk in (4096, 8, 16, 64))
    for found in cut:
        within("chunks and whole", found["r"].prompt_logprobs[1:], whole["r"].prompt_logprobs[1:])
    sampler = make(prefill_chunk_tokens=16)
    first = run_all(sampler, [ask])["s"]
    hits = []
    for end in range(len(tokens), 4, -7):
        kept = [picture for picture in pictures if picture.start + picture.num_tokens <= end]
        known = with_pictures(sample("t", tokens[:end], max_tokens=6, temperature=0.0), kept)
        if any(picture.start < end < picture.start + picture.num_tokens for picture in pictures):
            continue
        again = run_all(sampler, [known])["t"]
        alone = run_all(make(prefill_chunk_tokens=16), [known])["t"]
        hits.append(again.prompt_cache_hit_tokens)
        if deterministic:
            assert_same_sample(replace(again, prompt_cache_hit_tokens=0), alone)
        within("chunks and whole", again.sequences[0].logprobs, alone.sequences[0].logprobs)
    assert max(hits) > 64
    assert_same_sample(first, cut[1]["s"]) if deterministic else None


def test_what_was_preempted_is_computed_again(dense, make_base) -> None:
    base = make_base(dense)
    items = []
    for index in range(4):
        tokens, pictures = scenery(base, index, SIZES[:2], 30)
        items.append(with_pictures(sample(f"r{index}", tokens, seed=index, max_tokens=120), pictures))
    roomy = run_all(make_sampler(base), items)
    sampler = with_blocks(base, 8)
    tight = run_all(sampler, items)
    assert sampler.preemptions.num_preempted
    for name, result in roomy.items():
        np.testing.assert_array_equal(result.sequences[0].tokens, tight[name].sequences[0].tokens)
        np.testing.assert_allclose(result.sequences[0].logprobs, tight[name].sequences[0].logprobs, rtol=0, atol=BOUND)


def test_one_changed_pixel_changes_the_logprobs(dense, make_base) -> None:
    """Of the tokens after the picture, also where the rest was found in the prefix cache; not of those before it."""
    base = make_base(dense)
    scenes = (scenery(base, seed, SIZES[:2], 150) for seed in range(99))
    tokens, pictures = next(scene for scene in scenes if 64 < scene[1][1].start < 110)
    other = [pictures[0], changed(pictures[1])]
    sampler = make_sampler(base)
    asks = [with_pictures(sample("r", tokens, prompt_logprobs=True, max_tokens=1), seen) for seen in (pictures, other)]
    one, two = (run_all(sampler, [ask])["r"].prompt_logprobs for ask in asks)
    start, end = pictures[1].start, pictures[1].start + pictures[1].num_tokens
    np.testing.assert_array_equal(one[1:start], two[1:start])
    assert (one[end + 1 :] != two[end + 1 :]).all()
    assert np.abs(one[end + 1 :] - two[end + 1 :]).max() > 1e-4
    unknown = [pictures[0], replace(pictures[1], data=noise(pictures[1].width, pictures[1].height, 999))]
    asks = [with_pictures(sample("r", tokens, max_tokens=1), seen) for seen in (pictures, unknown, unknown)]
    found = [run_all(sampler, [ask])["r"] for ask in asks]
    assert [result.prompt_cache_hit_tokens for result in found] == [128, 64, 128]
    assert found[0].sequences[0].logprobs != found[1].sequences[0].logprobs


def test_a_picture_is_looked_at_once(dense, make_base) -> None:
    """By training and sampling alike; forgotten ones are looked at again, and nothing changes by it."""
    base = make_base(dense, deterministic=True)
    trainer = make_trainer(base, RUNS[0])
    one = seeing(base, 77)
    before = base.eyes.num_looks
    (first,) = run_pass(trainer, [item("a", [one, one], backward=False)])
    (again,) = run_pass(trainer, [item("a", [one], backward=False)])
    assert base.eyes.num_looks == before + len(SIZES)
    held, base.eyes.max_bytes = base.eyes.max_bytes, 1
    try:
        (third,) = run_pass(trainer, [item("a", [one], backward=False)])
    finally:
        base.eyes.max_bytes = held
    assert base.eyes.num_looks > before + len(SIZES)
    for found in (again, third):
        np.testing.assert_array_equal(first.logprobs[0], found.logprobs[0])


def spoiled(one: Datum, how: str) -> Datum:
    picture = one.pictures[0]
    match how:
        case "unreadable":
            broken = replace(picture, data=picture.data[: len(picture.data) // 2])
        case "of another size":
            broken = replace(picture, width=picture.width + 1)
        case "of other pixels":
            broken = replace(picture, data=one.pictures[1].data)
        case _:
            broken = replace(picture, num_tokens=picture.num_tokens - 1)
    return replace(one, pictures=(broken, *one.pictures[1:]))


@pytest.mark.parametrize("how", ["unreadable", "of other pixels", "of fewer tokens"])
def test_a_bad_picture_fails_its_request_alone(dense, make_base, how: str) -> None:
    base = make_base(dense)
    good, bad = data_of(base, 3), spoiled(seeing(base, 12), how)
    trainer = make_trainer(base, *RUNS, deterministic=False)
    failed, done = run_pass(trainer, [item("a", [good[0], bad]), item("b", good)])
    alone = make_trainer(base, RUNS[1], deterministic=False)
    (expected,) = run_pass(alone, [item("b", good)])
    assert isinstance(failed, Failure)
    assert failed.category == "user"
    assert failed.message.startswith("datum 1: ")
    assert not any(gradient.any() for gradient in grads(trainer, "a").values())
    for ours, theirs in zip(done.logprobs, expected.logprobs, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=BOUND)

    sampler = make_sampler(base)
    text = sample("text", prompt(1, 20, VOCAB), max_tokens=3)
    ask = with_pictures(sample("bad", bad.tokens, max_tokens=3), bad.pictures)
    if how == "of fewer tokens":
        with pytest.raises(Exception, match="tokens were sent for it"):
            sampler.submit(ask)
        return
    results = run_all(sampler, [ask, text])
    assert isinstance(results["bad"], Failure)
    assert results["bad"].category == "user"
    assert len(results["text"].sequences[0].tokens) == 3


def test_pages_and_recorded_steps_give_the_same(dense, make_base, monkeypatch) -> None:
    """Decoded tokens go on where the pictures' rotary positions end."""
    base = make_base(dense)
    items = []
    for index, sizes in enumerate((SIZES, (), SIZES[:1])):
        tokens, pictures = scenery(base, index, sizes, 40)
        items.append(with_pictures(sample(f"r{index}", tokens, num_samples=2, seed=index, max_tokens=30), pictures))
    expected = run_all(make_sampler(base), items)
    with tables_in_use(monkeypatch):
        recorder = Recorder()
        sampler = Sampler(base, Settings(), Letters(), is_paged=True, capture=recorder)
        found = run_all(sampler, items)
    assert (recorder.num_replays > 0) == (sampler._walker.graphs is not None)
    for name, result in expected.items():
        for one, other in zip(result.sequences, found[name].sequences, strict=True):
            np.testing.assert_array_equal(one.tokens, other.tokens)
            np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=BOUND)


def test_a_picture_for_which_there_is_no_memory_is_refused(dense, make_base, monkeypatch) -> None:
    base = make_base(dense)
    trainer = make_trainer(base, *RUNS, deterministic=False)
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 1)
    rng = np.random.default_rng(1)
    failed, done = run_pass(trainer, [item("a", [seeing(base, 555)]), item("b", [datum(rng, 20)])])
    assert failed.code == "out_of_memory"
    assert "not enough memory to look at a picture of 40 x 24 pixels" in failed.message
    assert not isinstance(done, Failure)


def test_pictures_count_twice_in_a_pack(dense, make_base) -> None:
    """Once for their tokens, once for being looked at; a pack's bound holds them in both."""
    base = make_base(dense)
    one = seeing(base, 5)
    work = item("a", [one]).work
    assert work == one.num_tokens + sum(picture.num_tokens for picture in one.pictures)
    trainer = make_trainer(base, RUNS[0], deterministic=False)
    training_pass = trainer.start_pass([item("a", [one, one, one])])
    assert training_pass.advance(3 * work - 1).num_tokens == 2 * one.num_tokens


def test_text_goes_through_a_model_whose_vision_is_not_known(tmp_path) -> None:
    text = LlamaConfig(**COMMON)
    tower = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    torch.manual_seed(3)
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=tower, image_token_index=IMAGE))
    model.save_pretrained(tmp_path)
    info = BaseInfo("llava", str(tmp_path), "llava", VOCAB, 512, ())
    base = load_base(info, device=torch.device("cpu"), dtype=torch.float32)
    tokens = prompt(1, 40, IMAGE)
    sampler = make_sampler(base)
    result = run_all(sampler, [sample("r", tokens, prompt_logprobs=True, max_tokens=1)])["r"]
    with torch.no_grad():
        expected = model.eval()(input_ids=torch.from_numpy(tokens)[None]).logits[0].log_softmax(-1).numpy()
    np.testing.assert_allclose(result.prompt_logprobs[1:], expected[np.arange(39), tokens[1:]], rtol=0, atol=BOUND)
    assert not any("vision" in linear.name for linear in base.linears)
    with pytest.raises(UnsupportedError, match="llava takes no pictures"):
        sampler.submit(with_pictures(sample("p", tokens), [Picture(0, 4, noise(16, 16), 16, 16)]))


def test_the_api_knows_the_size_of_an_adapter(kind, make_base) -> None:
    """The tower has none, whatever its layers are called."""
    base = make_base(kind)
    info = describe(BaseRef("x", Path(base.info.path)))
    for targets in (Targets(), Targets(mlp=False), Targets(attn=False, unembed=False)):
        asked = RunSpec(RunId("r"), "x", rank=3, targets=targets)
        assert info.adapter_bytes(asked) == 4 * RowLayout(base.linears, targets, 3).num_params
