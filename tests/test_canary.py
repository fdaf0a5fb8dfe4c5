"""The search for secrets finds them: else what it does not find says nothing."""

import base64
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.canary import hits

SECRET = "s3cr+t/of=a:kind"


@pytest.mark.parametrize(
    "text",
    [
        f"log line with {SECRET} in it",
        f"https://somebody:{quote(SECRET, safe='')}@host",
        SECRET.encode().hex(),
        *(base64.b64encode(f"{user}:{SECRET}".encode()).decode() for user in ("ab", "abc", "abcd")),
    ],
)
def test_a_secret_is_found_however_it_is_written(tmp_path: Path, text: str) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("deep/file", "kept"):
        (tmp_path / name).write_bytes(b"\0" * 1000 + text.encode())
    (tmp_path / "other").write_text("nothing")
    assert hits({"it": SECRET}, [tmp_path], but={tmp_path / "kept"}) == [f"it in {tmp_path / 'deep/file'}"]
