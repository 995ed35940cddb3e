from __future__ import annotations

import pyrage
import pytest

from tinsmith.age import check_recipients, encrypt
from tinsmith.errors import UserError

SSH = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAqgVTVmbx4RRH2iVPcGBFXAkmfmAVcXqCXMDGJJlcOe someone@somewhere"


def test_every_recipient_can_read_it() -> None:
    identities = [pyrage.x25519.Identity.generate() for _ in range(2)]
    keys = check_recipients([str(identity.to_public()) for identity in identities] + [SSH])
    sealed = encrypt(b"weights", keys)
    assert b"weights" not in sealed
    assert [pyrage.decrypt(sealed, [identity]) for identity in identities] == [b"weights"] * 2
    with pytest.raises(pyrage.DecryptError):
        pyrage.decrypt(sealed, [pyrage.x25519.Identity.generate()])


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
