"""The tokeniser and the corpus as token ids.

    python -m examples.tiny_moe.tokens      after examples.tiny_moe.corpus

Trains a byte-level BPE (arXiv 1508.07909) on the training text, saves it with the model, and writes data/train.npy and
data/heldout-DOMAIN.npy: uint16 ids, with END before every document. model/prompts.json holds beginnings of held-out
documents, for tests and demonstrations.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).parent
DATA, MODEL = HERE / "data", HERE / "model"
VOCAB = 4096
END, END_TOKEN = 0, "<|endoftext|>"
BATCH = 2000  # documents that are encoded at once
PROMPTS, PROMPT_CHARACTERS = 100, 300
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"  # it continues text, no more

Ids = NDArray[np.uint16]


def documents(path: Path) -> Iterator[tuple[str, str]]:
    """(domain, text) of each line of `path`."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            document = json.loads(line)
            yield document["domain"], document["text"]


def train_tokenizer(texts: Iterator[str], vocab: int = VOCAB) -> Tokenizer:
    """A byte-level BPE of `vocab` tokens, END_TOKEN first; digits stand alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END_TOKEN], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_TOKEN,
        "eos_token": END_TOKEN,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def encode(tokenizer: Tokenizer, texts: list[str]) -> Ids:
    """All `texts` one after the other, END before each."""
    tokenizer.encode_special_tokens = True  # a text that spells END_TOKEN does not end there
    parts: list[Ids] = []
    for start in range(0, len(texts), BATCH):
        for encoding in tokenizer.encode_batch(texts[start : start + BATCH], add_special_tokens=False):
            parts += [np.array([END], dtype=np.uint16), np.array(encoding.ids, dtype=np.uint16)]
    return np.concatenate(parts)


def prompts_of(heldout: dict[str, list[str]]) -> list[str]:
    """Beginnings of PROMPTS documents, taken from the domains in turn."""
    turns = [texts[turn] for turn in range(PROMPTS) for _, texts in sorted(heldout.items()) if turn < len(texts)]
    return [text[:PROMPT_CHARACTERS].rsplit(maxsplit=1)[0] for text in turns[:PROMPTS]]


def main() -> None:
    train = [text for _, text in documents(DATA / "train.jsonl")]
    tokenizer = train_tokenizer(iter(train))
    save_tokenizer(tokenizer, MODEL)
    ids = encode(tokenizer, train)
    np.save(DATA / "train.npy", ids)
    size = sum(len(text.encode()) for text in train)
    print(f"train: {len(ids):,} tokens, {size / len(ids):.2f} bytes each")
    heldout: dict[str, list[str]] = defaultdict(list)
    for domain, text in documents(DATA / "heldout.jsonl"):
        heldout[domain].append(text)
    for domain, texts in sorted(heldout.items()):
        ids = encode(tokenizer, texts)
        np.save(DATA / f"heldout-{domain}.npy", ids)
        size = sum(len(text.encode()) for text in texts)
        print(f"held-out {domain}: {len(ids):,} tokens, {size / len(ids):.2f} bytes each")
    (MODEL / "prompts.json").write_text(json.dumps(prompts_of(heldout), indent=0, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
