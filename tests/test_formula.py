"""The Homebrew formula against ``pyproject.toml`` and the rules of ``brew audit`` that can be checked without brew."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from expertd.protocol import VERSION
from tools.formula import FORMULA, written

TEXT = FORMULA.read_text()
PROJECT = tomllib.loads((FORMULA.parents[1] / "pyproject.toml").read_text())["project"]


def stanza(name: str) -> str:
    """The one value of a stanza such as ``license``."""
    (found,) = re.findall(rf'^  {name} "([^"]*)"$', TEXT, re.MULTILINE)
    assert isinstance(found, str)
    return found


def test_it_is_ruby() -> None:
    if shutil.which("ruby") is None:
        pytest.skip("there is no ruby")
    done = subprocess.run(["ruby", "-wc", str(FORMULA)], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "Syntax OK", "")


def test_version_and_licence_are_the_package_s() -> None:
    assert stanza("url").endswith(f"/expertd-{VERSION}.tar.gz")
    assert stanza("license") == PROJECT["license"]
    assert "  version " not in TEXT, "brew reads it from the url, and says so if it is given twice"


def test_the_url_has_the_form_that_package_indexes_promise() -> None:
    assert re.fullmatch(
        r"https://files\.pythonhosted\.org/packages/source/e/expertd/expertd-[0-9.]+(?:(?:a|b|rc)\d+)?\.tar\.gz",
        stanza("url"),
    )
    assert re.fullmatch(r"[0-9a-f]{64}", stanza("sha256"))
    assert stanza("homepage").startswith("https://")


def test_the_description_keeps_to_the_rules() -> None:
    description = stanza("desc")
    assert description == PROJECT["description"]
    assert len(description) <= 80
    assert not description.endswith(".")
    assert description == description.strip()
    assert description[0].isupper()
    assert not re.match(r"(?i)(a|an|the|expertd)\b", description)


def test_stanzas_are_in_their_order() -> None:
    order = ["desc", "homepage", "url", "sha256", "license", "depends_on", "on_macos", "def install", "def caveats",
             "test do"]  # fmt: skip
    places = [re.search(rf"^  {re.escape(name)}\b", TEXT, re.MULTILINE) for name in order]
    assert None not in places
    assert [place.start() for place in places if place] == sorted(place.start() for place in places if place)
    assert TEXT.startswith("class Expertd < Formula\n")
    assert max(map(len, TEXT.splitlines())) <= 118


def test_its_python_is_one_that_the_package_takes() -> None:
    (minor,) = {int(found) for found in re.findall(r"python@3\.(\d+)|python3\.(\d+)", TEXT) for found in found if found}
    assert PROJECT["requires-python"] == ">=3.11"
    assert f"Programming Language :: Python :: 3.{minor}" in PROJECT["classifiers"]


def test_it_tests_what_it_installs_and_tells_of_the_service() -> None:
    test = TEXT.partition("  test do\n")[2]
    assert "#{bin}/expertd --version" in test
    assert 'ENV["EXPERTD_HOME"] = testpath' in test, "not the user's home"
    assert "expertd service install" in TEXT.partition("def caveats")[2].partition("  end\n")[0]


def test_a_release_is_written_into_it() -> None:
    new = written(TEXT, "expertd-1.2.0rc1.tar.gz", b"content")
    changed = [line for line, old in zip(new.splitlines(), TEXT.splitlines(), strict=True) if line != old]
    assert changed == [
        '  url "https://files.pythonhosted.org/packages/source/e/expertd/expertd-1.2.0rc1.tar.gz"',
        f'  sha256 "{hashlib.sha256(b"content").hexdigest()}"',
    ]


@pytest.mark.parametrize("name", ["expertd.tar.gz", "other-1.0.tar.gz", "expertd-1.0.zip"])
def test_what_is_no_source_distribution_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no source distribution"):
        written(TEXT, name, b"")


def test_a_formula_without_a_place_is_refused() -> None:
    with pytest.raises(ValueError, match="0 url and 1 sha256"):
        written(TEXT.replace("  url ", "  # url "), "expertd-1.0.tar.gz", b"")


def test_it_lies_where_brew_looks_in_a_tap() -> None:
    assert FORMULA.relative_to(Path(__file__).parents[1]) == Path("Formula/expertd.rb")
