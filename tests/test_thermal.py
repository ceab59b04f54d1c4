"""Whether it is hot, from made-up machines: drives of Linux, and the level that macOS tells."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from expertd.daemon.thermal import MacThermal, never_hot, nvme_hot, system_thermal


def drive(root: Path, number: int, **files: str) -> None:
    folder = root / f"hwmon{number}"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text + "\n")


@pytest.mark.parametrize(
    ("files", "hot"),
    [
        ({"name": "nvme", "temp1_input": "84850", "temp1_max": "81850"}, True),
        ({"name": "nvme", "temp1_input": "81850", "temp1_max": "81850"}, True),
        ({"name": "nvme", "temp1_input": "45850", "temp1_max": "81850"}, False),
        ({"name": "coretemp", "temp1_input": "99000", "temp1_max": "80000"}, False),
        ({"name": "nvme", "temp1_input": "99000"}, False),
        ({"name": "nvme", "temp1_input": "warm", "temp1_max": "81850"}, False),
        ({}, False),
    ],
    ids=["hotter", "at its limit", "cool", "no drive", "no limit", "nonsense", "nothing"],
)
def test_a_drive_is_hot_at_its_own_limit(files: dict[str, str], hot: bool, tmp_path: Path) -> None:
    drive(tmp_path, 0, **files)
    assert nvme_hot(tmp_path) is hot


def test_one_hot_drive_is_enough(tmp_path: Path) -> None:
    drive(tmp_path, 0, name="nvme", temp1_input="30000", temp1_max="80000")
    drive(tmp_path, 1, name="nvme")
    drive(tmp_path, 2, name="nvme", temp1_input="90000", temp1_max="80000")
    assert nvme_hot(tmp_path)


def test_a_machine_without_sensors_is_not_hot(tmp_path: Path) -> None:
    assert not nvme_hot(tmp_path / "nowhere")


def notify(level: int, register: int = 0, get: int = 0) -> Any:
    """A library that tells this level."""

    def notify_get_state(token: Any, state: Any) -> int:
        assert token.value == 5
        state._obj.value = level
        return get

    def notify_register_check(name: bytes, token: Any) -> int:
        assert name == b"com.apple.system.thermalpressurelevel"
        token._obj.value = 5
        return register

    return SimpleNamespace(notify_register_check=notify_register_check, notify_get_state=notify_get_state)


@pytest.mark.parametrize(("level", "hot"), [(0, False), (1, False), (2, True), (3, True), (4, True)])
def test_a_mac_is_hot_from_heavy_pressure_on(level: int, hot: bool) -> None:
    assert MacThermal(notify(level))() is hot


def test_a_mac_that_does_not_tell_is_not_hot() -> None:
    assert not MacThermal(notify(3, get=1))()
    with pytest.raises(OSError, match="status 7"):
        MacThermal(notify(3, register=7))
    with pytest.raises(OSError, match="notify_register_check"):
        MacThermal(SimpleNamespace())  # type: ignore[arg-type]


def test_this_system_has_one() -> None:
    assert system_thermal()() in (True, False)
    assert not never_hot()
    if sys.platform == "linux":
        assert system_thermal() is nvme_hot
