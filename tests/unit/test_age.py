from __future__ import annotations

import base64
from itertools import product

import pyrage
import pytest

from tinsmith.errors import UserError
from tinsmith.files.age import check_recipients, encrypt

SSH = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAqgVTVmbx4RRH2iVPcGBFXAkmfmAVcXqCXMDGJJlcOe someone@somewhere"


def test_every_recipient_can_read_it() -> None:
    identities = [pyrage.x25519.Identity.generate() for _ in range(2)]
    keys = check_recipients([str(identity.to_public()) for identity in identities] + [SSH])
    sealed = encrypt(b"weights", keys)
    assert b"weights" not in sealed
    assert [pyrage.decrypt(sealed, [identity]) for identity in identities] == [b"weights"] * 2
    with pytest.raises(pyrage.DecryptError):
        pyrage.decrypt(sealed, [pyrage.x25519.Identity.generate()])


def ssh(*fields: bytes, tail: bytes = b"") -> str:
    data = b"".join(len(field).to_bytes(4) + field for field in fields) + tail
    return f"{fields[0].decode()} {base64.b64encode(data).decode()}"


EXPONENT, MODULUS = b"\1\0\1", b"\0" + b"\xc1" * 256


def test_malformed_ssh_keys_are_refused() -> None:
    """Some make the library panic, which is no Exception."""
    assert check_recipients([ssh(b"ssh-rsa", EXPONENT, MODULUS)])
    bad = [ssh(b"ssh-rsa", e, n) for e, n in product((b"", b"\0", b"\2", EXPONENT), (b"", b"\0", b"\xff" * 256, b"\3"))]
    bad += [ssh(b"ssh-rsa", EXPONENT), ssh(b"ssh-rsa"), ssh(b"ssh-ed25519"), ssh(b"ssh-ed25519", b"")]
    bad += [ssh(b"ssh-rsa", EXPONENT, MODULUS[:-1], tail=b"\0"), ssh(b"ssh-rsa", tail=b"\xff\xff\xff\xff")]
    for key in bad:
        with pytest.raises(UserError, match="is no public key"):
            check_recipients([key])


def test_a_panic_of_the_library_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        pass

    class Recipient:
        @staticmethod
        def from_str(text: str) -> None:
            raise KeyboardInterrupt if text.endswith("stop") else PanicException("index out of bounds")

    monkeypatch.setattr("tinsmith.files.age.pyrage.x25519.Recipient", Recipient)
    with pytest.raises(UserError, match="is no public key"):
        check_recipients(["age1x"])
    with pytest.raises(KeyboardInterrupt):
        check_recipients(["age1stop"])


@pytest.mark.parametrize("texts", [None, []])
def test_none_are_none(texts: list[str] | None) -> None:
    assert check_recipients(texts) == ()


@pytest.mark.parametrize("bad", ["", "age1", "age1" + "q" * 60, "ssh-rsa x", "ssh-ed25519", "a" * 10**6, "\x00", "é"])
def test_others_are_refused_by_place(bad: str) -> None:
    with pytest.raises(UserError, match=r"age_encryption_recipients\[1\] is no public key"):
        check_recipients([SSH, bad])


def test_a_secret_key_is_no_recipient_and_is_not_repeated() -> None:
    secret = str(pyrage.x25519.Identity.generate())
    with pytest.raises(UserError) as caught:
        check_recipients([secret])
    assert secret not in caught.value.message


def test_at_most_ten() -> None:
    assert len(check_recipients([SSH] * 10)) == 10
    with pytest.raises(UserError, match="at most 10"):
        check_recipients([SSH] * 11)
