"""What the official SDK can ask of a sampling client, against a real server; numbers against transformers."""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from tinker import types
from transformers import AutoModelForCausalLM

from tests.service import Service, running, until
from tinsmith.bases.catalog import SHIPPED_PATH
from tinsmith.store import open_store
from tinsmith.types import OpId

TEXT = [5, 17, 42, 99, 7, 13, 28, 64, 3, 250, 17, 42]
PROMPT = types.ModelInput.from_ints(TEXT)
TOLERANCE = 1e-5  # between our own numbers
FLOAT32 = 3e-5  # from float64: 1.4e-5 at worst was seen here, and plain transformers in float32 is no closer


@pytest.fixture(scope="module")
def service(shared_server: Service) -> Service:
    return shared_server


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Every offer turned off, and hardly any room to queue."""
    off = ("--no-retrieve-futures", "--no-join-sampling-session", "--no-cancel-future")
    tight = ("--max-queued-samples", "3", "--max-resident-samples", "2")
    with running(tmp_path_factory.mktemp("plain") / "data", *off, *tight) as service:
        yield service


def connect(service: Service) -> tinker.ServiceClient:
    return tinker.ServiceClient(base_url=service.url, api_key=service.key)


@pytest.fixture(scope="module")
def sampler(service: Service) -> tinker.SamplingClient:
    return connect(service).create_sampling_client(base_model="tinsmith/tiny").result()


def reference(tokens: list[int], temperature: float = 1.0) -> np.ndarray[Any, Any]:
    """[N, V] of transformers in float64, as float32."""
    model = AutoModelForCausalLM.from_pretrained(SHIPPED_PATH, dtype=torch.float64, attn_implementation="eager")
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens])).logits[0]
    return (logits / temperature).log_softmax(-1).float().numpy()


def test_top_k_of_prompt_and_samples(sampler: tinker.SamplingClient) -> None:
    params = types.SamplingParams(max_tokens=10, temperature=0.8, seed=3, stop=[])
    answer = sampler.sample(
        PROMPT, 2, params, include_prompt_logprobs=True, topk_prompt_logprobs=2, topk_sample_logprobs=3
    ).result()
    rows = reference(TEXT)
    assert answer.prompt_logprobs is not None
    assert answer.topk_prompt_logprobs is not None
    assert (answer.prompt_logprobs[0], answer.topk_prompt_logprobs[0]) == (None, None)
    np.testing.assert_allclose(answer.prompt_logprobs[1:], rows[np.arange(11), TEXT[1:]], atol=FLOAT32)
    for position, top in enumerate(answer.topk_prompt_logprobs[1:]):
        assert top is not None
        np.testing.assert_allclose([p for _, p in top], np.sort(rows[position])[::-1][:2], atol=FLOAT32)
    for sequence in answer.sequences:
        tokens, tops = list(sequence.tokens), sequence.topk_logprobs
        assert sequence.logprobs is not None
        assert tops is not None
        rows = reference(TEXT + tokens, 0.8)[len(TEXT) - 1 : -1]
        np.testing.assert_allclose(sequence.logprobs, rows[np.arange(10), tokens], atol=FLOAT32)
        for row, top in zip(rows, tops, strict=True):
            assert top is not None
            np.testing.assert_allclose([p for _, p in top], np.sort(row)[::-1][:3], atol=FLOAT32)
            np.testing.assert_allclose([p for _, p in top], row[[t for t, _ in top]], atol=FLOAT32)


def test_the_last_n_prompt_logprobs(sampler: tinker.SamplingClient) -> None:
    whole = sampler.compute_logprobs(PROMPT).result()
    found = sampler.compute_logprobs(PROMPT, prompt_logprobs_last_n=4).result()
    assert found[:-4] == [None] * 8
    np.testing.assert_allclose(found[-4:], whole[-4:], atol=TOLERANCE)  # type: ignore[arg-type]
    np.testing.assert_allclose(whole[1:], reference(TEXT)[np.arange(11), TEXT[1:]], atol=FLOAT32)  # type: ignore[arg-type]
    with pytest.raises(tinker.RequestFailedError, match=r"1\.\.11, not 12"):
        sampler.compute_logprobs(PROMPT, prompt_logprobs_last_n=12).result()


@pytest.mark.parametrize("is_sparse", [False, True])
def test_target_prompt_logprobs(sampler: tinker.SamplingClient, is_sparse: bool) -> None:
    ids = torch.full((11, 5), -1, dtype=torch.int64)
    ids[4, 1], ids[10, 0], ids[10, 4] = 77, 8, 1023
    target = types.TensorData.from_torch_sparse(ids, pad_value=-1) if is_sparse else types.TensorData.from_torch(ids)
    params = types.SamplingParams(max_tokens=1)
    answer = sampler.sample(PROMPT, 1, params, target_prompt_logprobs=target).result()
    found = answer.target_prompt_logprobs
    assert found is not None
    assert (found.dtype, found.shape) == ("float32", [11, 5])
    assert (found.sparse_crow_indices is not None) == is_sparse
    rows = torch.from_numpy(reference(TEXT)[:11])
    expected = torch.where(ids >= 0, rows.gather(1, ids.clamp(min=0)), 0.0)
    torch.testing.assert_close(found.to_torch(), expected, atol=FLOAT32, rtol=0)
    short = types.TensorData.from_torch(ids[1:])
    with pytest.raises(tinker.RequestFailedError, match="give 11, one for each prompt token after the first"):
        sampler.sample(PROMPT, 1, params, target_prompt_logprobs=short).result()
    none = types.TensorData.from_torch(torch.full((11, 1), -1))
    with pytest.raises(tinker.RequestFailedError, match="names no token id"):
        sampler.sample(PROMPT, 1, params, target_prompt_logprobs=none).result()


def test_alternatives_to_prompt_tokens(sampler: tinker.SamplingClient) -> None:
    params = types.SamplingParams(max_tokens=1, seed=4, temperature=0.5)
    drawn = sampler.sample(PROMPT, 1, params, prompt_alt_tokens_k=6).result().prompt_alt_tokens
    again = sampler.sample(PROMPT, 1, params, prompt_alt_tokens_k=6).result().prompt_alt_tokens
    assert drawn is not None
    assert again is not None
    tokens, logprobs = drawn.tokens.to_torch(), drawn.logprobs.to_torch()
    assert (tokens.shape, tokens.dtype, logprobs.dtype) == ((11, 6), torch.int64, torch.float32)
    torch.testing.assert_close(logprobs, torch.from_numpy(reference(TEXT)[:11]).gather(1, tokens), atol=FLOAT32, rtol=0)
    assert torch.equal(tokens, again.tokens.to_torch())


def test_seeds_repeat_and_samples_differ(sampler: tinker.SamplingClient) -> None:
    params = types.SamplingParams(max_tokens=12, seed=9, stop=[])
    alone = sampler.sample(PROMPT, 3, params).result().sequences
    others = [sampler.sample(PROMPT, 2, types.SamplingParams(max_tokens=20)) for _ in range(10)]
    among = sampler.sample(PROMPT, 3, params).result().sequences
    assert [list(s.tokens) for s in alone] == [list(s.tokens) for s in among]
    assert len({tuple(s.tokens) for s in alone}) == 3
    assert len({s.sequence_id for s in (*alone, *among)}) == 6
    for other in others:
        other.result()


def test_a_long_prompt_is_found_again(service: Service) -> None:
    sampler = connect(service).create_sampling_client(base_model="tinsmith/tiny").result()
    ids = [3 + i * i % 1000 for i in range(700)]
    prompt, params = types.ModelInput.from_ints(ids), types.SamplingParams(max_tokens=4, seed=1, stop=[])
    first, second = (sampler.sample(prompt, 1, params).result() for _ in range(2))
    assert (first.prompt_cache_hit_tokens, second.prompt_cache_hit_tokens) == (0, 512)
    assert list(first.sequences[0].tokens) == list(second.sequences[0].tokens)
    assert first.sequences[0].logprobs == second.sequences[0].logprobs
    whole = sampler.compute_logprobs(prompt).result()
    suffix = sampler.compute_logprobs(prompt, prompt_logprobs_last_n=50).result()
    np.testing.assert_allclose(suffix[-50:], whole[-50:], atol=TOLERANCE)  # type: ignore[arg-type]


def test_beyond_the_context_is_refused_before_any_work(sampler: tinker.SamplingClient) -> None:
    long = types.ModelInput.from_ints([1] * 2000)
    with pytest.raises(tinker.RequestFailedError, match=r"prompt \(2000\) plus max_tokens \(49\) exceed .* at most 48"):
        sampler.sample(long, 1, types.SamplingParams(max_tokens=49)).result()


def test_a_record_for_a_loss_that_is_not_offered_is_refused(service: Service) -> None:
    """What recipes send that train with stable_reinforce; the message says which loss needs no record."""
    run = connect(service).create_lora_training_client("tinsmith/tiny", rank=2).result()
    recording = run.save_weights_and_get_sampling_client(record_stability_info=True).result()
    with pytest.raises(tinker.RequestFailedError, match="loss_fn=importance_sampling") as refusal:
        recording.sample(types.ModelInput.from_ints([1, 2, 3]), 1, types.SamplingParams(max_tokens=1)).result()
    assert refusal.value.category == types.RequestErrorCategory.User
    plain = run.save_weights_and_get_sampling_client().result()
    assert plain.sample(types.ModelInput.from_ints([1, 2, 3]), 1, types.SamplingParams(max_tokens=1)).result().sequences


def test_inflight_clients_follow_the_run_and_snapshots_do_not(service: Service) -> None:
    run = connect(service).create_lora_training_client("tinsmith/tiny", rank=8, seed=3).result()
    snapshot = run.save_weights_and_get_sampling_client().result()
    first = run.save_weights_and_get_sampling_client(kind="inflight").result()
    before = snapshot.compute_logprobs(PROMPT).result()
    assert first.compute_logprobs(PROMPT).result() == before
    data = types.Datum(
        model_input=types.ModelInput.from_ints(TEXT[:-1]), loss_fn_inputs={"target_tokens": np.array(TEXT[1:])}
    )
    run.forward_backward([data], "cross_entropy")
    run.optim_step(types.AdamParams(learning_rate=2e-2)).result()
    assert first.compute_logprobs(PROMPT).result() == before
    second = run.save_weights_and_get_sampling_client(kind="inflight").result()
    after = second.compute_logprobs(PROMPT).result()
    assert after != before
    assert first.compute_logprobs(PROMPT).result() == after
    assert snapshot.compute_logprobs(PROMPT).result() == before


def test_clones_are_numbered_and_answered(
    service: Service, sampler: tinker.SamplingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINKER_API_KEY", service.key)
    handle = sampler.get_sampler_handle()
    clones = [tinker.SamplingClient.from_sampler_handle(handle) for _ in range(2)]
    clones.append(pickle.loads(pickle.dumps(sampler)))
    params = types.SamplingParams(max_tokens=5, seed=1, stop=[])
    answers = [client.sample(PROMPT, 1, params) for client in (*clones, sampler) for _ in range(3)]
    tokens = {tuple(answer.result().sequences[0].tokens) for answer in answers}
    assert len(tokens) == 1
    numbers = [clone._cloned_sampler_id for clone in clones]
    assert len(set(numbers)) == 3
    assert all(number is not None and 0 < number < 100 for number in numbers)


def test_an_abandoned_sample_is_cancelled_and_frees_its_place(service: Service, sampler: tinker.SamplingClient) -> None:
    endless = types.SamplingParams(max_tokens=2000, stop=[])

    async def abandon() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(sampler.sample(PROMPT, 64, endless), 0.5)

    store = open_store(service.data_dir)
    asyncio.run(abandon())
    with store._database.read() as conn:
        rows = "SELECT op_id, tenant_id FROM ops WHERE kind = 'sample' ORDER BY num DESC LIMIT 1"
        op_id, tenant_id = conn.exec_driver_sql(rows).one()
    until(lambda: store.ops.get(tenant_id, OpId(op_id)).state == "cancelled", 5)
    answer = sampler.sample(PROMPT, 1, types.SamplingParams(max_tokens=2)).result(timeout=10)
    assert len(answer.sequences) == 1
    store.close()


def most_queued(service: Service) -> int:
    """The longest that the queue of samples ever was."""
    store = open_store(service.data_dir)
    with store._database.read() as conn:
        rows = conn.exec_driver_sql("SELECT created_at, started_at FROM ops WHERE kind = 'sample'").all()
    store.close()
    changes = sorted([(row.started_at, -1) for row in rows] + [(row.created_at, 1) for row in rows])
    return max(itertools.accumulate(change for _, change in changes))


def test_with_every_offer_turned_off_and_a_full_queue(plain: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve samples against room for three: the SDK is told to wait, and rides through."""
    monkeypatch.setenv("TINKER_API_KEY", plain.key)
    client = connect(plain).create_sampling_client(base_model="tinsmith/tiny").result()
    clone = tinker.SamplingClient.from_sampler_handle(client.get_sampler_handle())
    assert clone._cloned_sampler_id
    assert not client.holder.get_client_config().sample_use_retrieve_futures
    params = types.SamplingParams(max_tokens=60, stop=[])
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        futures = list(pool.map(lambda i: (client, clone)[i % 2].sample(PROMPT, 1, params), range(12)))
    assert [len(future.result(timeout=120).sequences[0].tokens) for future in futures] == [60] * 12
    until(lambda: '"status": 429' in plain.log.read_text(), 5)
    assert most_queued(plain) <= 3
