from __future__ import annotations

import pytest

from tinsmith.signing import SECRET_BYTES, Signer

SIGNER = Signer(b"a" * SECRET_BYTES)


def test_a_signature_is_for_its_purpose_and_values() -> None:
    good = SIGNER.sign("download", "run", "file", 7)
    assert SIGNER.is_good(good, "download", "run", "file", 7)
    for purpose, *values in (
        ("token", "run", "file", 7),
        ("download", "run", "file", 8),
        ("download", "run", "file", "7"),
        ("download", "runfile", 7),
        ("download", "run", "fil", "e", 7),
        ("download", "run\nfile", 7),
    ):
        assert not SIGNER.is_good(good, purpose, *values)


@pytest.mark.parametrize("wrong", ["", "é", "\udcff", "0" * 64, "A" * 64])
def test_other_signatures_are_bad(wrong: str) -> None:
    assert not SIGNER.is_good(wrong, "download", "run")


def test_another_secret_signs_otherwise() -> None:
    assert not Signer(b"b" * SECRET_BYTES).is_good(SIGNER.sign("download"), "download")
    with pytest.raises(ValueError):
        Signer(b"short")
