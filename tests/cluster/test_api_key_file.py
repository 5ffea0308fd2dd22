"""The file of API keys: what keygen adds to it, and what is refused."""

from __future__ import annotations

import re
import stat
from pathlib import Path

import pytest

from splitserve.cluster.api_key_file import hash_key, read_api_keys
from splitserve.cluster.errors import StartupError
from splitserve.deploy.cli import main

HASH = hash_key("sk-test")


def keygen(capsys: pytest.CaptureFixture[str], file: Path, name: str) -> str:
    assert main(["keygen", "--api", name, str(file)]) == 0
    return capsys.readouterr().out.strip()


def test_keygen_adds_hashes_and_prints_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.toml"
    alice = keygen(capsys, file, "alice")
    assert re.fullmatch("sk-[A-Za-z0-9_-]{43}", alice)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.write_text(file.read_text() + "concurrent = 3 # her laptop")  # no end of line
    bob = keygen(capsys, file, "bob")
    assert alice != bob
    keys = read_api_keys(file)
    assert {name: key.sha256 for name, key in keys.items()} == {"alice": hash_key(alice), "bob": hash_key(bob)}
    assert keys["alice"].concurrent == 3
    assert alice not in file.read_text()
    assert "# her laptop" in file.read_text()
    assert HASH not in repr(keys)


@pytest.mark.parametrize("name", ["alice", "", "a b", "a.b", "x" * 61, "[x]", "é"])
def test_odd_or_taken_names_leave_the_file_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    file = tmp_path / "keys.toml"
    keygen(capsys, file, "alice")
    before = file.read_bytes()
    assert main(["keygen", "--api", name, str(file)]) == 2
    assert f"api: found {name!r}"[:60] in capsys.readouterr().err
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[alice]", "alice.sha256: Field required"),
        ('[alice]\nsha256 = "abc"', "alice.sha256: String should match pattern"),
        (f'[alice]\nsha256 = "{HASH}\\n"', "alice.sha256: String should match pattern"),
        (f'[alice]\nsha256 = "{HASH}"\nlimit = 1', "alice.limit: Extra inputs are not permitted"),
        (f'[alice]\nsha256 = "{HASH}"\nconcurrent = 0', "alice.concurrent: Input should be greater than or equal to 1"),
        (
            f'[alice]\nsha256 = "{HASH}"\ntokens_per_minute = 1.5',
            "alice.tokens_per_minute: Input should be a valid int",
        ),
        (f'[alice]\nsha256 = "{HASH}"\n[alice]\nsha256 = "{HASH}"', "Cannot declare ('alice',) twice"),
        (f'["a b"]\nsha256 = "{HASH}"', "found a holder 'a b'"),
        ("alice = 5", "alice: Input should be"),
        ("alice", "expected TOML in UTF-8"),
        ("x = " + "[" * 100_000, "expected TOML in UTF-8"),
        ("\x00", "expected TOML in UTF-8"),
        ("#" * (1 << 20) + "#", "over 1 MiB"),
    ],
)
def test_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(text)
    with pytest.raises(StartupError, match=re.escape(f"security.api_keys: {file}: ")) as caught:
        read_api_keys(file)
    assert message in str(caught.value)
    assert HASH not in str(caught.value)
