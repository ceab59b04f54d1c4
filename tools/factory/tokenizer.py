"""A tokenizer for made-up checkpoints: byte-level BPE of exactly the model's vocabulary, with a ChatML template.

Every id that the model can emit decodes, every text encodes and comes back unchanged. Nothing is trained: merges are
listed from letters in order of their frequency in English, so that the files are the same everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

__all__ = ["BOS_ID", "CHAT_TEMPLATE", "EOS_ID", "SPECIAL_TOKENS", "write_tokenizer"]

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
BOS_ID, EOS_ID = 0, 2

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# By frequency; the first is how byte-level BPE writes a space.
LETTERS = "Ġetaoinshrdlucmfwypvbgkjqxz"


def write_tokenizer(folder: Path, vocab: int) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` of ``vocab`` entries; specials first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = list(islice(_merges(), vocab - len(SPECIAL_TOKENS) - len(alphabet)))
    entries = [*SPECIAL_TOKENS, *alphabet, *(left + right for left, right in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={entry: i for i, entry in enumerate(entries)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[BOS_ID],
        "eos_token": SPECIAL_TOKENS[EOS_ID],
        "pad_token": SPECIAL_TOKENS[BOS_ID],
        "model_max_length": 32768,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _merges() -> Iterator[tuple[str, str]]:
    """Pairs of letters, then pair and letter, then pair and pair: lengths 2, 3 and 4, so that no entry comes twice."""
    ranks = sorted(product(range(len(LETTERS)), repeat=2), key=lambda ranks: (sum(ranks), ranks))
    # A space only begins an entry, as the pre-tokenizer cuts text before spaces.
    pairs = [LETTERS[i] + LETTERS[j] for i, j in ranks if j > 0]
    yield from ((pair[0], pair[1]) for pair in pairs)
    yield from product(pairs, LETTERS[1:])
    yield from product(pairs, (pair for pair in pairs if pair[0] != LETTERS[0]))
