"""Write the Homebrew formula for a release.

    python -m tools.formula dist/expertd-0.1.0.tar.gz

takes version and checksum from the source distribution that is about to be published, and puts them into
``Formula/expertd.rb``.  Nothing else in that file changes; ``tests/test_formula.py`` holds it to ``pyproject.toml``.
"""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path

FORMULA = Path(__file__).parents[1] / "Formula" / "expertd.rb"
SOURCE = "https://files.pythonhosted.org/packages/source/e/expertd"


def written(formula: str, name: str, content: bytes) -> str:
    """``formula`` with the source distribution ``name``.

    Raises:
        ValueError: that is no name of one, or the formula has no place for it.
    """
    if not re.fullmatch(r"expertd-\d+(\.\d+)*((a|b|rc)\d+)?\.tar\.gz", name):
        raise ValueError(f"{name} is no source distribution of expertd (expertd-VERSION.tar.gz)")
    formula, urls = re.subn(r'^  url ".*"$', f'  url "{SOURCE}/{name}"', formula, flags=re.MULTILINE)
    digest = hashlib.sha256(content).hexdigest()
    formula, sums = re.subn(r'^  sha256 ".*"$', f'  sha256 "{digest}"', formula, flags=re.MULTILINE)
    if (urls, sums) != (1, 1):
        raise ValueError(f"the formula has {urls} url and {sums} sha256, where one of each has to be")
    return formula


def main() -> None:
    """Write the formula for the file that is named."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: python -m tools.formula dist/expertd-VERSION.tar.gz\n\n{__doc__}")
    source = Path(sys.argv[1])
    try:
        FORMULA.write_text(written(FORMULA.read_text(), source.name, source.read_bytes()))
    except (OSError, ValueError) as error:
        sys.exit(f"tools.formula: {error}")
    print(f"{FORMULA} is for {source.name} now")


if __name__ == "__main__":
    main()
