"""The text that the demo model is trained on: Python's documentation and standard library, one licence (PSF-2.0).

Two kinds of documents come out of it: plain text (pages and modules as they are) and short dialogues in the chat
template, derived mechanically ("What does textwrap.fill do?" and the documentation's own answer), so that the model
learns what a turn is.  Nothing is downloaded: the pages are those of Debian's ``python3.11-doc``, the modules those of
``libpython3.11-stdlib``.
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class Document:
    """One document: ``source`` names where it came from, ``text`` has its special tokens written out."""

    source: str
    text: str


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


def documents(docs: Path, library: Path, seed: int = 0) -> list[Document]:
    """All documents, shuffled by ``seed``.

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
        out.append(Document(name, BOS + plain(rst)))
        out.extend(Document(name, BOS + text) for text in _page_dialogues(rst, chance))
    for path in modules:
        try:
            source = path.read_text(encoding="utf-8")
            spoken = list(_module_dialogues(source))
        except (UnicodeDecodeError, SyntaxError) as error:
            print(f"left out {path.name}: {error}")
            continue
        name = str(path.relative_to(library))
        out.append(Document(name, f"{BOS}# {name}\n{source}"))
        out.extend(Document(name, BOS + text) for text in spoken)
    chance.shuffle(out)
    return out


def held_out(document: Document) -> bool:
    """Whether a document's source belongs to the 2 % that training never sees (by a stable hash of its name)."""
    import zlib

    return zlib.crc32(document.source.encode()) % 50 == 7
