"""Builds tokenizer.json from a GGUF file's byte-level BPE."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from splitserve.cluster.errors import ModelLoadError
from splitserve.models.config_keys import Keys

CONTROL, USER_DEFINED = 3, 4

LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _words(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


# By `tokenizer.ggml.pre`: how text is cut into words before merging.
PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": _gpt2,
    "smollm": _smollm,
    "llama-bpe": lambda: _words(LLAMA3_WORDS),
    "qwen2": lambda: _words(QWEN2_WORDS),
}


def write_tokenizer(fields: Mapping[str, Any], folder: Path, source: str) -> None:
    """Write tokenizer.json and tokenizer_config.json from a GGUF file's metadata `fields`.

    Raises ModelLoadError, naming the key, for a kind of tokenizer that is not supported.
    """
    build_tokenizer(fields, source).save(str(folder / "tokenizer.json"))
    keys = Keys(fields, source)
    tokens = keys.strings("tokenizer.ggml.tokens")
    special = {
        name: tokens[_token_id(keys, key, tokens)]
        for name, key in (
            ("bos_token", "tokenizer.ggml.bos_token_id"),
            ("eos_token", "tokenizer.ggml.eos_token_id"),
            ("unk_token", "tokenizer.ggml.unknown_token_id"),
            ("pad_token", "tokenizer.ggml.padding_token_id"),
        )
        if key in fields
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    if "tokenizer.chat_template" in fields:
        if not isinstance(fields["tokenizer.chat_template"], str):
            raise keys.error("tokenizer.chat_template", "expected a string")
        settings["chat_template"] = fields["tokenizer.chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False), "utf-8")


def build_tokenizer(fields: Mapping[str, Any], source: str) -> Tokenizer:
    """The tokenizer that `fields` describe; its special tokens are those marked as control tokens."""
    keys, words = Keys(fields, source), fields.get("tokenizer.ggml.pre")
    if fields.get("tokenizer.ggml.model") != "gpt2":
        raise keys.error("tokenizer.ggml.model", "expected gpt2")
    if not isinstance(words, str) or words not in PRE_TOKENIZERS:
        raise keys.error("tokenizer.ggml.pre", f"expected one of {', '.join(PRE_TOKENIZERS)}")
    tokens, kinds = keys.strings("tokenizer.ggml.tokens"), keys.token_ids("tokenizer.ggml.token_type")
    if len(kinds) != len(tokens):
        raise keys.error("tokenizer.ggml.token_type", f"expected {len(tokens)} numbers, one a token")
    try:
        return _build(keys, words, tokens, kinds)
    except ModelLoadError:
        raise
    except Exception as error:  # the Rust library raises several unrelated types
        raise ModelLoadError(f"{source}: tokenizer.ggml: not a tokenizer ({error}); fetch the file again") from error


def _build(keys: Keys, words: str, tokens: list[str], kinds: Sequence[int]) -> Tokenizer:
    halves = [merge.partition(" ") for merge in keys.strings("tokenizer.ggml.merges")]
    merges = [(left, right) for left, _, right in halves]
    vocab = {token: index for index, token in enumerate(tokens)}
    # Llama 3 takes a word that is itself a token whole, whatever its merges would give.
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=words == "llama-bpe"))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[words]()
    tokenizer.decoder = decoders.ByteLevel()
    if words == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    kind_of = list(zip(tokens, kinds, strict=True))
    tokenizer.add_special_tokens([_whole(token, True) for token, kind in kind_of if kind == CONTROL])
    tokenizer.add_tokens([_whole(token, False) for token, kind in kind_of if kind == USER_DEFINED])
    tokenizer.post_processor = _post_processor(keys, tokens)
    return tokenizer


def _whole(token: str, special: bool) -> AddedToken:
    return AddedToken(token, normalized=False, special=special)


def _token_id(keys: Keys, key: str, tokens: list[str]) -> int:
    token_id = keys.integer(key, minimum=0)
    if token_id >= len(tokens):
        raise keys.error(key, f"there are {len(tokens)} tokens")
    return token_id


def _post_processor(keys: Keys, tokens: list[str]) -> processors.PostProcessor:
    if not keys.has("tokenizer.ggml.bos_token_id") or not keys.raw.get("tokenizer.ggml.add_bos_token", False):
        return processors.ByteLevel(trim_offsets=False)
    bos = _token_id(keys, "tokenizer.ggml.bos_token_id", tokens)
    return processors.TemplateProcessing(single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)])
