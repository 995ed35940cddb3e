"""What goes wrong with one request fails that one alone: its neighbours notice nothing, not even in a bit."""

from __future__ import annotations

from typing import Any

import pytest

from tests.numerics.sampling_lab import assert_same_sample, make_sampler, prompt, run_all, sample
from tinsmith.sampling import decode, prefill
from tinsmith.sampling.logits import Warp
from tinsmith.sampling.stop import StopRule
from tinsmith.types import Failure

EVIL = 0.123  # a temperature that marks the request to blame
ITEMS = [
    sample("one", prompt(1, 40), num_samples=3, seed=1, max_tokens=12, temperature=0.9, top_k=2**70),
    sample("evil", prompt(2, 30), num_samples=2, seed=2, max_tokens=12, temperature=EVIL, presence_penalty=0.1),
    sample("other", prompt(3, 5), seed=3, max_tokens=12),
]


def raising(real: Any, is_to_blame: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        if is_to_blame(*args, **kwargs):
            raise ZeroDivisionError("of this request alone")
        return real(*args, **kwargs)

    return call


def in_the_warp(monkeypatch: pytest.MonkeyPatch) -> None:
    evil = raising(Warp.of, lambda params, *_: any(p.temperature == EVIL for p in params))
    monkeypatch.setattr(Warp, "of", evil)


def in_the_penalties(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the third token on."""

    def is_to_blame(_: Any, params: Any, tokens: Any) -> bool:
        return any(p.temperature == EVIL and len(t) > 2 for p, t in zip(params, tokens, strict=True))

    monkeypatch.setattr(decode, "penalise", raising(decode.penalise, is_to_blame))


def in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    rules: list[Any] = []
    of = StopRule.of

    def kept(params: Any, *rest: Any) -> StopRule:
        rule = of(params, *rest)
        if params.temperature == EVIL:
            rules.append(rule)
        return rule

    monkeypatch.setattr(StopRule, "of", kept)
    monkeypatch.setattr(StopRule, "ends", raising(StopRule.ends, lambda rule, _: any(rule is evil for evil in rules)))


def in_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_to_blame(chunks: Any) -> bool:
        return any(chunk.prompt.item.op_id == "evil" for chunk in chunks)

    monkeypatch.setattr(prefill, "_segments", raising(prefill._segments, is_to_blame))


@pytest.mark.parametrize("place", [in_the_warp, in_the_penalties, in_the_end, in_the_prompt])
def test_a_request_fails_alone(base: Any, monkeypatch: pytest.MonkeyPatch, place: Any) -> None:
    alone = {item.op_id: run_all(make_sampler(base), [item])[item.op_id] for item in (ITEMS[0], ITEMS[2])}
    place(monkeypatch)
    sampler = make_sampler(base)
    together = run_all(sampler, ITEMS)
    assert isinstance(together["evil"], Failure)
    assert (together["evil"].code, together["evil"].category) == ("internal", "server")
    for name, expected in alone.items():
        assert_same_sample(together[name], expected)
    assert sampler.memory.num_held_blocks == sampler.memory.kv.num_allocated_blocks == 0
