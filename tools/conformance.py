"""Run the vendors' own test suites against a real ``expertd serve``: ``make conformance``.

The suites are those files of the ``openai`` and ``anthropic`` source distributions that test the APIs that the gateway
speaks, of the versions that are installed here.  They come from PyPI into ``.tmp/conformance``, with a virtual
environment of their own, so the first run needs a network; later ones do not.

What came out is compared with ``tools/conformance.toml``: the tests that do not apply, each by name, with the reason
and with what the failure has to say.  The exit status is 1 if a test fails that is not listed, if one that is listed
passes, fails in another way or does not exist, and if a suite runs no tests.  A test that was skipped has not passed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from tools.stage import temporary_home

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".tmp" / "conformance"
LIST = Path(__file__).with_suffix(".toml")
MODEL = ROOT / "models" / "demo"
FOLDER = "tests/api_resources"
LONGEST_S = 1800
"""For a suite.  Many tests want answers of any length, and the demo model may talk for long."""
AT_ONCE = 4
"""Tests that run at the same time; their answers are decoded in one batch."""

TOOLS = ("pytest>=9,<10", "pytest-asyncio>=1.4,<2", "pytest-xdist>=3.6,<4", "respx", "inline-snapshot>=0.28",
         "http-snapshot[httpx]==0.1.9", "dirty-equals>=0.6")  # fmt: skip
"""What the suites import beside the libraries that they test; see ``dependency-groups`` in their pyproject.toml."""


@dataclass(frozen=True)
class Suite:
    """A vendor's tests.

    Attributes:
        package: on PyPI.
        files: below ``FOLDER``.
        path: what its client wants at the end of the gateway's address.
    """

    package: str
    files: tuple[str, ...]
    path: str

    @property
    def version(self) -> str:
        """The installed one."""
        return importlib.metadata.version(self.package)


SUITES = (
    Suite(
        "openai", ("chat/test_completions.py", "test_completions.py", "test_models.py", "test_responses.py"), "/v1"
    ),
    Suite("anthropic", ("test_messages.py",), ""),
)


@dataclass(frozen=True)
class Outcome:
    """How one test ended, with one set of parameters.

    Attributes:
        suite: the package's name.
        file: below ``FOLDER``.
        test: the function's name; synchronous and asynchronous tests share it, and so do their parameters.
        case: what tells it from the others of that name.
        failure: what it said; None: it passed.
    """

    suite: str
    file: str
    test: str
    case: str
    failure: str | None

    def __str__(self) -> str:
        return f"{self.suite} {self.file} {self.test} ({self.case})"


@dataclass(frozen=True)
class Exempt:
    """Tests of one file that do not apply.

    Attributes:
        tests: names of functions.
        reason: why, in a few words.
        says: what each failure has to contain, so that it is known to fail for this reason.
    """

    suite: str
    file: str
    tests: tuple[str, ...]
    reason: str
    says: str


def read_list(path: Path = LIST) -> list[Exempt]:
    """The tests that do not apply."""
    entries = tomllib.loads(path.read_text(encoding="utf-8"))["exempt"]
    return [Exempt(**(entry | {"tests": tuple(entry["tests"])})) for entry in entries]


def read_report(suite: str, xml: str) -> list[Outcome]:
    """The outcomes in a report of pytest (junit)."""
    found = []
    for case in ElementTree.fromstring(xml).iter("testcase"):
        # tests.api_resources.chat.test_completions.TestCompletions, and test_method_create[loose]
        *modules, group = case.get("classname", "").removeprefix(FOLDER.replace("/", ".") + ".").split(".")
        test, _, parameters = case.get("name", "").partition("[")
        told = [part for part in case if part.tag in ("failure", "error", "skipped")]
        failure = " ".join(f"{part.tag}: {part.get('message', '')} {part.text or ''}" for part in told) or None
        parameters = parameters.removesuffix("]")
        found.append(Outcome(suite, "/".join(modules) + ".py", test, f"{group}, {parameters}", failure))
    return found


def compare(outcomes: Sequence[Outcome], exempt: Sequence[Exempt]) -> list[str]:
    """What is not as the list says: a line for each."""
    listed = {(entry.suite, entry.file, test): entry for entry in exempt for test in entry.tests}
    found = []
    for one in outcomes:
        entry = listed.get((one.suite, one.file, one.test))
        if entry is None and one.failure is not None:
            found.append(f"FAILED  {one}: {_short(one.failure)}")
        elif entry is not None and one.failure is None:
            found.append(f"PASSED  {one}, but it is listed: {entry.reason}")
        elif entry is not None and entry.says not in (one.failure or ""):
            found.append(f"FAILED  {one}, but not with {entry.says!r}: {_short(one.failure or '')}")
    ran = {(one.suite, one.file, one.test) for one in outcomes}
    return found + [f"MISSING {' '.join(key)} is listed and does not exist" for key in listed if key not in ran]


def _short(failure: str) -> str:
    """The first line that tells an error, or else the first."""
    lines = [line.strip() for line in failure.splitlines() if line.strip()] or [""]
    return lines[0][:300]


def models_of(texts: Iterable[str]) -> list[str]:
    """The names of models that tests ask for, without the placeholder 'model'."""
    names = {name for text in texts for name in re.findall(r'\bmodel="([^"]+)"', text)}
    names |= {name for text in texts for name in re.findall(r'models\.[\w.]*retrieve\(\s*"([^"]+)"', text)}
    return sorted(names - {"model"})


# -- what touches the machine ------------------------------------------------------------------------------------------


def source_of(suite: Suite) -> Path:
    """The unpacked source distribution of a suite; it is downloaded if it is not here."""
    folder = CACHE / f"{suite.package}-{suite.version}"
    if not folder.is_dir():
        pinned = f"{suite.package}=={suite.version}"
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", suite.package]
        _call([*pip, "--dest", str(CACHE), pinned])
        (archive,) = CACHE.glob(f"{suite.package}-{suite.version}.tar.gz")
        unpacking = CACHE / "unpacking"  # so that what was broken off is not taken for the whole
        shutil.rmtree(unpacking, ignore_errors=True)
        with tarfile.open(archive) as tar:
            tar.extractall(unpacking, filter="data")
        (unpacking / folder.name).rename(folder)
        unpacking.rmdir()
        archive.unlink()
    return folder


def python_with(packages: Sequence[str]) -> Path:
    """A Python that has ``packages``, in an environment that is made anew when they change."""
    named = hashlib.sha256("\n".join([sys.version, *packages]).encode()).hexdigest()[:12]
    folder = CACHE / f"venv-{named}"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, clear=True, with_pip=True)
        _call([str(python), "-m", "pip", "install", "--quiet", *packages])
        (folder / "ready").touch()
    return python


def _call(command: Sequence[str]) -> None:
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"conformance: {' '.join(command)} failed:\n{ended.stdout}{ended.stderr}")


def deprecated_models(python: Path) -> list[str]:
    """The names that Anthropic's library warns of; a test asks for each."""
    program = "from anthropic.resources.messages import DEPRECATED_MODELS; print(*DEPRECATED_MODELS)"
    return subprocess.run([python, "-c", program], capture_output=True, text=True, check=True).stdout.split()


@contextmanager
def gateway(aliases: Sequence[str]) -> Iterator[str]:
    """The address of a gateway on the demo model, which has ``aliases`` and ends with the body."""
    with temporary_home():
        command = [sys.executable, "-m", "expertd.clients.cli"]
        options = [word for name in aliases for word in ("--alias", name)]
        with subprocess.Popen(
            [*command, "serve", str(MODEL), "--port", "0", *options], stdout=subprocess.PIPE, text=True
        ) as process:
            try:
                assert process.stdout is not None
                line = process.stdout.readline()
                if not line:
                    raise SystemExit("conformance: the gateway did not come up")
                yield line.split()[-1].removesuffix("/v1")
            finally:
                process.terminate()
                process.wait(60)
                subprocess.run([*command, "daemon", "stop"], capture_output=True, timeout=60)


def run_suite(suite: Suite, source: Path, python: Path, url: str) -> list[Outcome]:
    """Run a suite; how its tests ended."""
    report = CACHE / f"{suite.package}.xml"
    report.unlink(missing_ok=True)
    command = [str(python), "-m", "pytest", "-q", "-n", str(AT_ONCE), "-p", "no:cacheprovider"]
    command += [f"--junitxml={report}", *(f"{FOLDER}/{file}" for file in suite.files)]
    environment = {name: value for name, value in os.environ.items() if not name.endswith(("_API_KEY", "_BASE_URL"))}
    environment["TEST_API_BASE_URL"] = url + suite.path
    ended = subprocess.run(
        command, cwd=source, env=environment, capture_output=True, text=True, timeout=LONGEST_S
    )
    if not report.exists():
        raise SystemExit(f"conformance: the suite of {suite.package} did not run:\n{ended.stdout}{ended.stderr}")
    outcomes = read_report(suite.package, report.read_text(encoding="utf-8"))
    if not outcomes:
        raise SystemExit(f"conformance: the suite of {suite.package} has no tests:\n{ended.stdout}{ended.stderr}")
    return outcomes


def main() -> int:
    """Run all suites; the exit status."""
    CACHE.mkdir(parents=True, exist_ok=True)
    sources = {suite: source_of(suite) for suite in SUITES}
    python = python_with([*(f"{suite.package}[aiohttp]=={suite.version}" for suite in SUITES), *TOOLS])
    files = [source / FOLDER / file for suite, source in sources.items() for file in suite.files]
    outcomes: list[Outcome] = []
    names = models_of(file.read_text(encoding="utf-8") for file in files)
    with gateway([*names, *deprecated_models(python)]) as url:
        for suite, source in sources.items():
            found = run_suite(suite, source, python, url)
            outcomes += found
            passed = sum(one.failure is None for one in found)
            print(f"{suite.package} {suite.version}: {passed} of {len(found)} tests pass", flush=True)
    exempt = read_list()
    wrong = compare(outcomes, exempt)
    print("\ndo not apply, as listed:")
    listed = {(entry.suite, entry.file, test): entry.reason for entry in exempt for test in entry.tests}
    failed = [(one.suite, one.file, one.test) for one in outcomes if one.failure is not None]
    for reason, count in Counter(listed[key] for key in failed if key in listed).most_common():
        print(f"  {count:3}  {reason}")
    print(f"\n{len(wrong)} not as listed")
    for line in wrong:
        print(f"  {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
