"""``expertd pack``: what it writes, what it leaves behind however it ends, and what ``--verify`` finds."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from expertd.clients.cli import main
from expertd.clients.cli.progress import Progress
from expertd.protocol.packed import ALIGN, check_fits, header_of, layout_of, store_name
from expertd.protocol.paths import Home
from expertd.worker import store
from expertd.worker.manifest import load_lazily
from expertd.worker.store import part_path
from tests.conftest import DEADLINE_S
from tools.factory import write_checkpoint

BLOCKS = 48


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint whose file tests may change."""
    return write_checkpoint(tmp_path / "model", "qwen3_moe")


def pack(*arguments: object) -> Result:
    """``expertd pack`` in this process."""
    return CliRunner().invoke(main, ["pack", *map(str, arguments)])


def store_of(model: Path, folder: Path) -> Path:
    """Where the store of ``model`` belongs in ``folder``."""
    return folder / store_name(load_lazily(model).manifest.key)


def is_complete(model: Path, path: Path) -> bool:
    """Whether the store at ``path`` is right, to its last byte."""
    assert pack(model, "--verify").exit_code == 0
    check_fits(path, load_lazily(model).manifest)
    return True


STOPS = """
import os, signal, sys
plain, left = os.pwrite, [int(sys.argv[1])]
def pwrite(*arguments):
    left[0] -= 1
    if not left[0]:
        {what}
    return plain(*arguments)
os.pwrite = pwrite
from expertd.clients.cli import main
main(["pack", *sys.argv[2:]])
"""
"""``expertd pack`` that does something before its n-th write."""


def program(what: str, writes: int, model: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", STOPS.format(what=what), str(writes), str(model)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# -- writing -----------------------------------------------------------------------------------------------------------


def test_it_writes_the_store_into_the_home_and_names_it(model: Path, home: Home) -> None:
    path = store_of(model, home.packed)
    done = pack(model)
    assert done.exit_code == 0
    assert done.stdout == f"packed {model}: {BLOCKS} blocks, 1.2 MB, in {path}\n"
    assert "packed 1.2 MB of 1.2 MB (100 %), " in done.stderr
    assert [found.name for found in home.packed.iterdir()] == [path.name]
    assert home.packed.stat().st_mode & 0o077 == 0
    assert is_complete(model, path)


def test_what_is_packed_already_is_left_as_it_is(model: Path, home: Home) -> None:
    pack(model)
    before = store_of(model, home.packed).stat()
    done = pack(model)
    assert done.stdout.startswith(f"{model} is packed already: {BLOCKS} blocks")
    after = store_of(model, home.packed).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_another_folder_gets_the_store_and_the_home_a_link(model: Path, home: Home, tmp_path: Path) -> None:
    output = tmp_path / "disk"
    assert "create it first" in pack(model, "-o", output).stderr
    output.mkdir()
    assert pack(model, "-o", output).exit_code == 0
    link, path = store_of(model, home.packed), store_of(model, output)
    assert link.readlink() == path
    assert [found.name for found in output.iterdir()] == [path.name]
    assert is_complete(model, path)
    link.unlink()
    assert "is packed already" in pack(model, "-o", output).stdout
    assert link.readlink() == path
    assert "is packed already" in pack(model).stdout


def test_a_store_that_is_elsewhere_stays_there_and_the_user_hears_how_to_move_it(
    model: Path, home: Home, tmp_path: Path
) -> None:
    pack(model)
    disk = tmp_path / "a disk"
    disk.mkdir()
    path = store_of(model, home.packed)
    done = pack(model, "-o", disk)
    assert done.stdout.startswith(f"{model} is packed already") and done.stdout.endswith(f" in {path}\n")
    moves = f"mv {path} '{disk}'"
    assert done.stderr == (
        f"expertd: --output is not used, because there is a store; to have it in {disk}: {moves}, "
        "and call this command again\n"
    )
    subprocess.run(moves, shell=True, check=True)
    done = pack(model, "-o", disk)
    assert done.stdout.startswith(f"{model} is packed already")
    assert done.stderr == ""
    assert path.readlink() == store_of(model, disk)


def test_a_link_that_leads_nowhere_is_named_and_replaced(model: Path, home: Home, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    pack(model, "-o", disk)
    link, path = store_of(model, home.packed), store_of(model, disk)
    path.rename(tmp_path / "away")
    cause = f"{link} leads to {path}, which is not there"
    done = pack(model, "--verify")
    assert done.exit_code == 2
    assert done.stderr.startswith(f"expertd: {cause}; mount its disk, or write another with: expertd pack {model}")
    done = pack(model)
    assert done.stderr.startswith(f"expertd: {cause}; another store is written\n")
    assert link.is_file() and not link.is_symlink()
    assert is_complete(model, link)


def test_a_store_that_does_not_fit_is_replaced_and_named(model: Path, home: Home) -> None:
    pack(model)
    path = store_of(model, home.packed)
    os.truncate(path, 5000)
    done = pack(model)
    assert f"the packed store {path} has 5000 bytes" in done.stderr
    assert is_complete(model, path)


def test_a_model_that_changes_meanwhile_is_an_error_that_leaves_nothing(
    model: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, writes = os.pwrite, []

    def pwrite(descriptor: int, what: memoryview, offset: int) -> int:
        writes.append(offset)
        if len(writes) == 50:
            os.utime(model / "model.safetensors", ns=(1, 1))
        return plain(descriptor, what, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    done = pack(model)
    assert (done.exit_code, done.stderr.rstrip()[-14:]) == (2, "[file_changed]")
    assert list(home.packed.iterdir()) == []


def test_what_is_no_checkpoint_is_refused_and_nothing_is_created(home: Home, tmp_path: Path) -> None:
    assert pack(tmp_path).exit_code == 2
    assert not home.packed.exists()


# -- runs that end early -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writes", [1, 2, 3, 40, 41, 2 * BLOCKS + 1])
def test_after_a_kill_the_next_run_goes_on(writes: int, model: Path, home: Home) -> None:
    with program("os.kill(os.getpid(), signal.SIGKILL)", writes, model) as killed:
        killed.wait(4 * DEADLINE_S)
    assert killed.returncode == -signal.SIGKILL
    path = store_of(model, home.packed)
    assert not path.exists()
    assert part_path(path).exists()
    assert counted_writes(model) == 2 * BLOCKS + 1 - (writes - 1) + (writes > 1 and writes % 2)
    assert [found.name for found in home.packed.iterdir()] == [path.name]
    assert is_complete(model, path)


def counted_writes(model: Path, *options: object) -> int:
    """Pack ``model``; returns how many writes that took."""
    plain, offsets = os.pwrite, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", lambda *given: (offsets.append(given[2]), plain(*given))[1])
        assert pack(model, *options).exit_code == 0
    return len(offsets)


def test_what_an_earlier_run_has_left_is_checked_not_believed(model: Path, home: Home) -> None:
    with program("os.kill(os.getpid(), signal.SIGKILL)", 60, model) as killed:
        killed.wait(4 * DEADLINE_S)
    path = store_of(model, home.packed)
    layout = layout_of(header_of(load_lazily(model).manifest))
    with part_path(path).open("r+b") as file:
        file.seek(layout.record(0, 3) + ALIGN)
        file.write(b"\1\2\3\4")
        file.seek(layout.entry(0, 5))
        file.write(b"\1\2\3\4")
    done = counted_writes(model)
    assert done == 2 * BLOCKS + 1 - 59 + 2 * 2  # those that were missing, and the two that were spoilt
    assert is_complete(model, path)


def test_what_an_earlier_run_has_left_of_something_else_is_not_used(model: Path, home: Home) -> None:
    path = store_of(model, home.packed)
    home.packed.mkdir()
    part_path(path).write_bytes(b"\xff" * 3_000_000)
    assert counted_writes(model) == 2 * BLOCKS + 1
    assert is_complete(model, path)


def test_ctrl_c_leaves_what_the_same_command_goes_on_with_and_says_so(model: Path, home: Home) -> None:
    path = store_of(model, home.packed)
    with program("signal.raise_signal(signal.SIGINT)", 50, model) as interrupted:
        _, said = interrupted.communicate(timeout=4 * DEADLINE_S)
    assert interrupted.returncode == 130
    assert said.endswith(f"interrupted; {part_path(path)} is kept, and the same command goes on with it\n")
    assert [found.name for found in home.packed.iterdir()] == [part_path(path).name]
    assert pack(model).exit_code == 0
    assert is_complete(model, path)


def test_two_at_a_time_exclude_each_other(model: Path, home: Home) -> None:
    with program("print('writing', flush=True) or sys.stdin.readline()", 50, model) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "writing\n"
        second = pack(model)
        part = part_path(store_of(model, home.packed))
        assert second.exit_code == 5
        assert second.stderr.endswith(
            f"expertd: another process is writing {part}; wait for it, or end it [pack_running]\n"
        )
        first.communicate("go on\n", timeout=4 * DEADLINE_S)
    assert first.returncode == 0
    assert is_complete(model, store_of(model, home.packed))


# -- no room -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB, which is less than the store needs."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1000k", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_too_small_is_refused_first_with_both_figures(
    model: Path, home: Home, small_disk: Path
) -> None:
    done = pack(model, "-o", small_disk)
    assert done.exit_code == 1
    assert f"the packed store of {model} needs 1.2 MB in {small_disk}, where 1.0 MB are free" in done.stderr
    assert done.stderr.endswith(" [pack_failed]\n")
    assert not store_of(model, small_disk).exists()


def test_a_disk_that_fills_up_meanwhile_is_an_error_and_the_next_run_goes_on(
    model: Path, home: Home, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store_of(model, small_disk)
    with monkeypatch.context() as patch:
        patch.setattr(store, "_check_room", lambda *_: None)
        done = pack(model, "-o", small_disk)
    assert done.exit_code == 1
    assert f"{part_path(path)} cannot be written (No space left on device)" in done.stderr
    assert [found.name for found in small_disk.iterdir()] == [part_path(path).name]
    assert list(home.packed.iterdir()) == []
    subprocess.run(["mount", "-o", "remount,size=2000k", str(small_disk)], check=True)
    assert 0 < counted_writes(model, "-o", small_disk) < BLOCKS
    assert is_complete(model, path)


def test_a_folder_that_cannot_be_written_is_a_sentence(model: Path, home: Home) -> None:
    done = pack(model, "-o", "/proc")
    assert done.exit_code == 1
    assert done.stderr.endswith(" [pack_failed]\n")
    assert "Traceback" not in done.stderr


# -- verifying ---------------------------------------------------------------------------------------------------------


def test_verify_says_that_a_store_is_right(model: Path, home: Home) -> None:
    pack(model)
    done = pack(model, "--verify")
    path = store_of(model, home.packed)
    assert (done.exit_code, done.stdout) == (
        0, f"{path} is right: {BLOCKS} blocks fit their checksums and the model\n"
    )  # fmt: skip


def test_as_json_pack_and_verify_tell_the_store(model: Path, home: Home) -> None:
    told = [json.loads(pack(model, *options, "--json").stdout) for options in ([], [], ["--verify"])]
    store = store_of(model, home.packed)
    same = {"model": str(model), "store": str(store), "blocks": BLOCKS, "bytes": store.stat().st_size}
    assert told == [same | {"written": True}, same | {"written": False}, same | {"right": True}]


def test_verify_without_a_store_says_how_to_write_one(model: Path, home: Home) -> None:
    done = pack(model, "--verify")
    assert done.exit_code == 2
    assert f"write one with: expertd pack {model} [store_invalid]" in done.stderr
    assert not home.packed.exists()


def test_verify_finds_a_flipped_bit_wherever_it_is(model: Path, home: Home) -> None:
    pack(model)
    path = store_of(model, home.packed)
    layout = layout_of(header_of(load_lazily(model).manifest))
    places = {
        "header": (50, "header of the packed store"),
        "after the header": (layout.start - 1, "beside its table"),
        "table": (layout.entry(1, 2), "layer 1 (model.layers.1.mlp.switch_mlp), expert 2 does not fit"),
        "after the table": (layout.record(0, 0) - 1, "beside its table"),
        "record": (layout.record(2, 15) + ALIGN, "layer 2 (model.layers.2.mlp.switch_mlp), expert 15 does not fit"),
        "between two parts": (layout.record(2, 3) + ALIGN - 1, "expert 3 is not what the model has"),
        "the end": (layout.size - 1, "expert 15 is not what the model has"),
    }
    raw = path.read_bytes()
    for name, (offset, sentence) in places.items():
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(bytes([raw[offset] ^ 4]))
        done = pack(model, "--verify")
        assert done.exit_code == 2, name
        assert sentence in done.stderr, name
        path.write_bytes(raw)
    assert is_complete(model, path)


def test_verify_names_the_first_of_several_bad_blocks(model: Path, home: Home) -> None:
    pack(model)
    path = store_of(model, home.packed)
    layout = layout_of(header_of(load_lazily(model).manifest))
    with path.open("r+b") as file:
        for block in ((2, 1), (0, 7)):
            file.seek(layout.record(*block))
            file.write(b"\xff\0\xff\0")
    assert "layer 0 (model.layers.0.mlp.switch_mlp), expert 7 does" in pack(model, "--verify").stderr


def test_verify_compares_with_the_model_too(model: Path, home: Home) -> None:
    """A record and its checksum may fit each other and yet not be the model's."""
    pack(model)
    path = store_of(model, home.packed)
    layout = layout_of(header_of(load_lazily(model).manifest))
    raw = bytearray(path.read_bytes())
    for place, length in ((layout.record, layout.header.layers[0].record_bytes), (layout.entry, 8)):
        one, other = place(0, 0), place(0, 1)
        raw[one : one + length], raw[other : other + length] = raw[other : other + length], raw[one : one + length]
    path.write_bytes(raw)
    assert "expert 0 is not what the model has" in pack(model, "--verify").stderr


# -- how far it is -----------------------------------------------------------------------------------------------------


class Times:
    """A clock that is set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_progress_tells_rate_and_remaining_time_of_what_this_run_does() -> None:
    clock = Times()
    progress = Progress("packed", 10_000_000, sys.stderr, clock)
    clock.now = 7.0
    progress.moved(5_000_000, False)
    assert progress.line() == "packed 5.0 MB of 10.0 MB (50 %)"
    clock.now = 9.0
    progress.moved(1_000_000, True)
    assert progress.line() == "packed 6.0 MB of 10.0 MB (60 %), 500 kB/s, 8 s left"
    clock.now = 1007.0
    assert progress.line().endswith(", 1.0 kB/s, 1 h 6 min left")
    progress.moved(4_000_000, True)
    assert progress.line() == "packed 10.0 MB of 10.0 MB (100 %), 5.0 kB/s"


def test_on_a_terminal_one_line_changes(model: Path, home: Home) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "expertd.clients.cli", "pack", str(model)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, text=True) as process:
        os.close(theirs)
        out, _ = process.communicate(timeout=4 * DEADLINE_S)
    said = os.read(ours, 65536).decode()
    os.close(ours)
    assert said.startswith("\rpacked ")
    assert said.endswith("\x1b[K\r\n")
    assert out.startswith(f"packed {model}: ")
