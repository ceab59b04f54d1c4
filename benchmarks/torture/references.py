"""What plain mlx-lm says to each prompt, with each of the two checkpoints that may be in the model's place."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

NAMES = ("model", "other")
QUESTION = "Question number {}: what is lost?"


@dataclass(frozen=True)
class References:
    """``said[checkpoint][prompt]`` are token ids, ``texts[checkpoint][question]`` what a chat answers.

    An answer has to be that of one checkpoint from its first token to its last: a mixture is wrong.
    """

    tokens: int
    prompts: list[list[int]]
    said: list[list[list[int]]]
    texts: list[list[str]]

    def write(self, folder: Path) -> None:
        (folder / "references.json").write_text(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> References:
        return cls(**json.loads((folder / "references.json").read_text()))
