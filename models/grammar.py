"""Grammars over one model's tokens: what a text may be, compiled by llguidance within limits of size and time.

A grammar is a string in llguidance's own form. A matcher is one text's place in it, and belongs to that text alone:
llguidance counts the lexer states of all copies of a matcher against one limit, so that one text could run into what
others had used up. The optional extra `grammar` brings llguidance.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from splitserve.cluster.errors import InvalidRequest, ModelLoadError, StartupError

if TYPE_CHECKING:
    from llguidance import LLMatcher

Mask = npt.NDArray[np.int32]
GRAMMAR_EXTRA = "pip install 'splitserve[grammar]'"
# Work of one compilation, and of one mask: together a few tens of milliseconds, where they are used up.
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 100_000,
}


class GrammarCompiler:
    """Compiles grammars for the tokenizer in `folder` and a vocabulary of `vocab_size`. Thread-safe.

    Texts end with one of `eos_token_ids`, the tokenizer's own if there are none. Raises StartupError without
    llguidance, ModelLoadError for the tokenizer.
    """

    def __init__(self, folder: Path, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise StartupError(f"constrained answers need llguidance: {GRAMMAR_EXTRA}") from error
        self._llguidance = llguidance
        path = folder / "tokenizer.json"
        try:
            text = path.read_text("utf-8")
            self._tokenizer = llguidance.LLTokenizer(text, n_vocab=vocab_size, eos_token=sorted(eos_token_ids) or None)
        except (OSError, ValueError) as error:
            raise ModelLoadError(f"{path}: no grammar can use this tokenizer: {error}") from error
        self._limits = llguidance.LLParserLimits(**LIMITS, verbose_errors=False)

    def compile(self, grammar: str) -> LLMatcher:
        """A matcher at the beginning of a text. Raises InvalidRequest for what is no grammar, or too large a one."""
        matcher = self._llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        check(matcher)
        return matcher


def allowed_tokens(matcher: LLMatcher) -> Mask:
    """One bit a token, the lowest first: whether it may come next. Raises InvalidRequest where that is too much work.

    Once the text can only end, these are the end-of-sequence tokens.
    """
    mask = np.frombuffer(matcher.compute_bitmask(), np.int32)
    check(matcher)
    return mask


def check(matcher: LLMatcher) -> None:
    """Raise InvalidRequest if `matcher` has met an error."""
    if matcher.is_error():
        reason = " ".join(matcher.get_error().removesuffix("<non-verbose/>").split())
        raise InvalidRequest("grammar", reason[:300], "give a grammar that can be compiled, and is small enough")
