"""Corpus -> tokenizer and token files: ``python -m tools.demo_model.prepare OUT``."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tools.demo_model.corpus import (
    BOS,
    DOMAINS,
    END,
    TURN,
    Document,
    held_out,
    prose_documents,
    python_documents,
    recall_documents,
)

VOCABULARY = 4096
EXCERPT, EXCERPTS = 8000, 64000
"""Characters of one held-out document, and of all of a domain, that the checkpoint brings along."""
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE of ``VOCABULARY`` entries; the three special tokens are ids 0, 1 and 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, TURN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, found: list[Document]) -> np.ndarray:
    """The tokens of all ``found`` one after another, uint16."""
    return np.concatenate([np.asarray(e.ids, np.uint16) for e in tokenizer.encode_batch([d.text for d in found])])


def excerpts(found: list[Document]) -> str:
    """The beginnings of plain texts, dialogues left out: what the checkpoint brings along to be measured with."""
    texts = [d.text.removeprefix(BOS) for d in found if TURN not in d.text]
    return "\n\n".join(text[:EXCERPT].rsplit("\n", 1)[0] for text in texts)[:EXCERPTS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--docs", type=Path, default=Path("/usr/share/doc/python3.11/html/_sources"))
    parser.add_argument("--library", type=Path, default=Path("/usr/lib/python3.11"))
    parser.add_argument("--prose", type=Path, default=Path("node_modules/@stdlib"))
    parser.add_argument("--tokenizer", type=Path, help="folder of a checkpoint whose tokenizer is kept")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    python = python_documents(arguments.docs, arguments.library)
    prose = prose_documents(arguments.prose)
    seen = [d for d in python + prose if not held_out(d)]
    unseen = [d for d in python + prose if held_out(d)]
    seen += recall_documents(seen, len(seen) // 12)
    unseen += recall_documents(unseen, 200, seed=1)
    random.Random(0).shuffle(seen)
    if arguments.tokenizer is not None:
        tokenizer = Tokenizer.from_file(str(arguments.tokenizer / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer([d.text for d in seen])
    tokenizer.save(str(arguments.out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": BOS,
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (arguments.out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    ids = encode(tokenizer, seen)
    np.save(arguments.out / "train.npy", ids)
    print(f"train: {len(seen)} documents, {ids.size / 1e6:.2f} M tokens")
    for domain in DOMAINS:
        chosen = [d for d in unseen if d.domain == domain]
        ids = encode(tokenizer, chosen)
        np.save(arguments.out / f"held_out_{domain}.npy", ids)
        if domain != "recall":
            (arguments.out / f"{domain}.txt").write_text(excerpts(chosen), encoding="utf-8")
        shown = [d for d in seen if d.domain == domain]
        size = sum(len(d.text.encode()) for d in chosen)
        print(
            f"{domain}: {len(shown)} documents, {sum(len(d.text.encode()) for d in shown) / 1e6:.1f} MB; held out "
            f"{len(chosen)} documents, {ids.size / 1e3:.1f} k tokens, {size / ids.size:.2f} bytes a token"
        )


if __name__ == "__main__":
    main()
