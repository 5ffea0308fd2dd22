"""Text to token ids and back, from a Hugging Face folder, without transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import tokenizers

from splitserve.cluster.errors import InvalidRequest, ModelLoadError
from splitserve.cluster.json_file import read_object
from splitserve.router.chat_template import ChatTemplate, Conversation
from splitserve.router.detokenizer import Detokenizer, TokenTable
from splitserve.router.pieces import Pieces


class Tokenizer:
    """The tokenizer of one model. As in transformers, the text of a special token (`<|im_end|>`) becomes that token
    wherever it stands, in what users write too."""

    def __init__(self, fast: tokenizers.Tokenizer, template: ChatTemplate | None, vocab_size: int) -> None:
        self._fast = fast
        self._template = template
        self._table = TokenTable(fast)
        self._pieces = Pieces(fast)
        self.vocab_size = vocab_size
        self.longest_token = max(map(len, fast.get_vocab(with_added_tokens=True)), default=1)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read tokenizer.json and, where present, config.json (vocab_size) and the chat template.

        Raises ModelLoadError naming the file that cannot be used.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelLoadError(f"{path}: not found; the model folder needs the tokenizer as tokenizer.json")
        try:
            fast = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust library raises bare Exception
            raise ModelLoadError(f"{path}: not a tokenizer: {error}") from error
        fast.no_truncation()
        fast.no_padding()
        settings = read_json(folder / "tokenizer_config.json")
        vocab_size = read_json(folder / "config.json").get("vocab_size", fast.get_vocab_size(with_added_tokens=True))
        if type(vocab_size) is not int or vocab_size < 1:
            raise ModelLoadError(
                f"{folder}: config.json: vocab_size: found {vocab_size!r:.80}; expected a number above 0"
            )
        return cls(fast, ChatTemplate.load(folder, settings), vocab_size)

    @property
    def chat_template(self) -> str:
        """The template's source; nothing where there is none."""
        return self._template.source if self._template else ""

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain prompt, with what the tokenizer itself adds (BOS, for some models)."""
        (encoding,) = self._fast.encode_batch_fast([text])  # without offsets
        return encoding.ids

    def encode_chat(
        self, messages: Conversation, tools: Sequence[Mapping[str, Any]] = (), *, remember: bool = True
    ) -> list[int]:
        """Token ids of a conversation, ready for the assistant's answer. Raises InvalidRequest."""
        if self._template is None:
            raise InvalidRequest("messages", "a model without a chat template", "use Generate with a plain prompt")
        # The template writes BOS and all other special tokens itself.
        text = self._template.render(messages, tools)
        return self._pieces.encode(text) if remember else self._pieces.tokenise(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of `token_ids`, special tokens left out. Raises InvalidRequest for ids outside the vocabulary."""
        self.check_ids("token_ids", token_ids)
        detokenizer = self.detokenizer()
        return "".join(map(detokenizer.push, token_ids)) + detokenizer.finish()

    def offsets(self, prompt: str | Sequence[int]) -> list[int]:
        """Where each token of a prompt begins in its text, or in what `decode` makes of its token ids."""
        if isinstance(prompt, str):
            begins, end = [], 0
            for start, stop in self._fast.encode(prompt).offsets:
                # Some leave out the blank that a token begins with; tokens that are no part of the text have 0 and 0.
                begins.append(min(start, end) if stop else end)
                end = max(end, stop)
            return begins
        lengths = map(len, map(self.detokenizer().push, prompt))
        return list(accumulate(lengths, initial=0))[:-1]

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text; of a special token, which adds nothing, its name."""
        return self._table[token_id] or (self._fast.id_to_token(token_id) or "").encode()

    def detokenizer(self) -> Detokenizer:
        """A fresh incremental decoder."""
        return Detokenizer(self._table)

    def check_ids(self, field: str, token_ids: Sequence[int]) -> None:
        """Raise InvalidRequest naming `field` unless all ids lie in the vocabulary."""
        if token_ids and (min(token_ids) < 0 or max(token_ids) >= self.vocab_size):
            wrong = next(token for token in token_ids if not 0 <= token < self.vocab_size)
            raise InvalidRequest(field, wrong, f"give token ids from 0 to {self.vocab_size - 1}")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, {} if there is no such file. Raises ModelLoadError naming the file."""
    return read_object(path) if path.is_file() else {}
