"""Where the files of a tar lie that was sent; what is refused of one is in `tests/contract/test_imports.py`."""

from __future__ import annotations

import io
import tarfile

from tinsmith.importing.archive import files_in


def test_directories_are_passed_over_and_what_lies_in_them_keeps_its_name() -> None:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name, kind, data in (
            (".", tarfile.DIRTYPE, b""),
            ("./a", tarfile.REGTYPE, b"one"),
            ("./sub/", tarfile.DIRTYPE, b""),
            ("./sub/a", tarfile.REGTYPE, b"two"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.size = kind, len(data)
            tar.addfile(member, io.BytesIO(data))
    sent = made.getvalue()
    found = files_in(made, len(sent))
    assert {name: sent[at.offset : at.offset + at.size] for name, at in found.items()} == {"a": b"one", "sub/a": b"two"}
