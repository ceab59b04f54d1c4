"""Files of API keys, what a request has of them, and where one is needed."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from multidict import CIMultiDict

from expertd.clients.gateway.keys import Key, KeyFile, check_exposure, find, given_key, is_loopback, parse_keys
from expertd.protocol.errors import ConfigInvalid, KeyFileInvalid
from expertd.protocol.paths import Home
from tests.test_homes import expertd

ONE, TWO = "0123456789abcdef", "fedcba9876543210fedcba"


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


def test_a_key_stands_alone_or_behind_its_name() -> None:
    text = f"# ours\n\n{ONE}   # of the editor\n  anna\t{TWO}\n"
    assert parse_keys(text, "keys") == [Key("line 3", ONE.encode()), Key("anna", TWO.encode())]


def test_a_key_is_never_shown() -> None:
    assert ONE not in repr(parse_keys(ONE, "keys"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "keys has no key; write one a line"),
        ("# nothing\n", "keys has no key"),
        (f"anna {ONE} {TWO}", "line 1 of keys has 3 words; write KEY, or NAME KEY"),
        (f"{ONE}\nsecret", "the key in line 2 of keys has to be at least 16 characters of ASCII"),
        ("anna ключключключключ", "the key in line 1 of keys has to be at least 16 characters of ASCII"),
    ],
)
def test_a_line_that_is_no_key_is_told_by_its_number_only(text: str, said: str) -> None:
    with pytest.raises(KeyFileInvalid, match=r"^" + said) as caught:
        parse_keys(text, "keys")
    assert not {ONE, TWO, "secret"} & set(caught.value.message.split())


def test_a_key_is_found_whole_or_not_at_all() -> None:
    keys = parse_keys(f"anna {ONE}\nbert {TWO}\n", "keys")
    assert (find(keys, ONE), find(keys, TWO)) == ("anna", "bert")
    for wrong in ("", ONE[:-1], ONE + "0", ONE.upper(), "anna", "\udcff", "ключ"):
        assert find(keys, wrong) is None


def basic(text: bytes) -> str:
    return "Basic " + base64.b64encode(text).decode()


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ({"Authorization": f"Bearer {ONE}"}, ONE),
        ({"authorization": f"bearer  {ONE} "}, ONE),
        ({"X-Api-Key": ONE}, ONE),
        ({"Authorization": "Bearer ", "x-api-key": ONE}, ONE),
        ({"Authorization": basic(b"anybody:" + ONE.encode())}, ONE),
        ({"Authorization": basic(b":a:b")}, "a:b"),
        ({"Authorization": basic(b"nobody")}, ""),
        ({"Authorization": "Basic !!"}, None),
        ({"Authorization": basic(b"\xff:\xff")}, None),
        ({"Authorization": ONE}, None),
        ({}, None),
    ],
)
def test_clients_and_browsers_send_a_key_in_their_own_ways(headers: dict[str, str], key: str | None) -> None:
    assert given_key(CIMultiDict(headers)) == key


def test_a_key_can_be_added_and_revoked_while_the_gateway_runs(tmp_path: Path) -> None:
    path = written(tmp_path / "keys", f"anna {ONE}\n")
    keys = KeyFile(path)
    assert (keys.name_of(ONE), keys.name_of(TWO), keys.name_of(None)) == ("anna", None, None)
    written(path, f"bert {TWO}\n")
    os.utime(path, ns=(1, 1))
    assert (keys.name_of(ONE), keys.name_of(TWO)) == (None, "bert")
    written(tmp_path / "new", f"anna {ONE}\n").replace(path)
    assert (keys.name_of(ONE), keys.name_of(TWO)) == ("anna", None)


def test_a_file_that_cannot_be_used_any_more_lets_nobody_in(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(tmp_path / "keys", f"anna {ONE}\n")
    keys = KeyFile(path)
    for spoil in (lambda: path.chmod(0o644), lambda: written(path, "short"), path.unlink):
        spoil()
        for _ in range(2):
            with pytest.raises(KeyFileInvalid, match=r"^this gateway cannot read its keys now; its log says why$"):
                keys.name_of(ONE)
    assert [record.message.split(":")[0] for record in caplog.records] == ["nobody is let in"] * 3, "once for each"
    assert "chmod 600" in caplog.text
    written(path, f"anna {ONE}\n")
    assert keys.name_of(ONE) == "anna"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.chmod(0o640), "others can read the key file PATH; make it your own with: chmod 600 PATH"),
        (lambda path: path.unlink(), "the key file PATH cannot be read (No such file or directory)"),
        (lambda path: (path.unlink(), path.mkdir()), "the key file PATH is not a file"),
        (lambda path: path.write_bytes(b"\xff" * 40), "the key file PATH is not text; write one key a line"),
        (lambda path: path.write_bytes(b"a" * (2 << 20)), "the key file PATH is longer than 1048576 bytes"),
    ],
)
def test_what_is_wrong_with_a_file_is_told(tmp_path: Path, spoil: Callable[[Path], object], said: str) -> None:
    path = written(tmp_path / "keys", f"{ONE}\n")
    spoil(path)
    with pytest.raises(KeyFileInvalid) as caught:
        KeyFile(path)
    assert caught.value.message.startswith(said.replace("PATH", str(path)))
    assert (caught.value.exit_status, caught.value.http_status) == (2, 503)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost", "LOCALHOST"])
def test_this_machine_alone_needs_no_key(host: str) -> None:
    assert is_loopback(host)
    check_exposure(host, has_keys=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "studio.local"])
def test_where_others_can_reach_it_a_key_is_needed(host: str) -> None:
    check_exposure(host, has_keys=True)
    with pytest.raises(ConfigInvalid, match=r"give a file of keys with --api-key-file, or listen on 127\.0\.0\.1"):
        check_exposure(host, has_keys=False)


def test_serve_starts_nothing_that_others_could_use_without_a_key(home: Home, checkpoints: dict[str, Path]) -> None:
    done = expertd("serve", str(checkpoints["stacked"]), "--host", "0.0.0.0", "--port", "0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith("which only this machine reaches [config_invalid]\n")
    written(home.root / "keys", "short\n")
    done = expertd("serve", str(checkpoints["stacked"]), "--api-key-file", str(home.root / "keys"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith("openssl rand -hex 24 [key_file_invalid]\n")
    assert not home.daemon_socket.exists()


@pytest.mark.parametrize("command", ["config", "variable"])
def test_a_service_needs_a_key_of_its_own_where_others_can_reach_it(
    home: Home, checkpoints: dict[str, Path], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = written(home.root / "keys", f"{ONE}\n")
    install = ["service", "install", "--dry-run", "--gateway", str(checkpoints["stacked"]), "--host", "0.0.0.0"]
    if command == "config":
        home.config.write_text(f'[serve]\napi_key_file = "{keys}"\n')
    else:
        monkeypatch.setenv("EXPERTD_SERVE_API_KEY_FILE", str(keys))
    done = expertd(*install)
    assert ("[config_invalid]" in done.stderr) == (command == "variable"), done.stderr
