"""Corpus -> tokenizer and token files: ``python -m tools.demo_model.prepare OUT``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tools.demo_model.corpus import BOS, END, TURN, documents, held_out

VOCABULARY = 4096
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--docs", type=Path, default=Path("/usr/share/doc/python3.11/html/_sources"))
    parser.add_argument("--library", type=Path, default=Path("/usr/lib/python3.11"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    found = documents(arguments.docs, arguments.library)
    tokenizer = train_tokenizer([d.text for d in found if not held_out(d)])
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
    for name, chosen in (("train", False), ("held_out", True)):
        texts = [d.text for d in found if held_out(d) is chosen]
        ids = np.concatenate([np.asarray(e.ids, np.uint16) for e in tokenizer.encode_batch(texts)])
        np.save(arguments.out / f"{name}.npy", ids)
        size = sum(len(t.encode()) for t in texts)
        print(f"{name}: {len(texts)} documents, {size / 1e6:.1f} MB, {ids.size / 1e6:.2f} M tokens")


if __name__ == "__main__":
    main()
