"""What constrained sequences may say next, computed in threads beside the engine's loop.

begin ----> compile, replay ----> mask ----> take(token) ----> mask ----> ...
                                   |            ^
                                   +-- sampler -+         a sequence without its mask waits, the others go on
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from splitserve.cluster.errors import InvalidRequest, SplitserveError
from splitserve.models.grammar import GrammarCompiler, Mask, allowed_tokens

if TYPE_CHECKING:
    from llguidance import LLMatcher

THREADS = 2
MASK_WAIT_S = 0.001


class Grammars:
    """The grammars of one engine. `load` makes the compiler, when the first constrained sequence comes."""

    def __init__(self, load: Callable[[], GrammarCompiler]) -> None:
        self._load = load
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="grammar")
        self._compiler: Future[GrammarCompiler] | None = None

    def begin(self, grammar: str, token_ids: Seq[int]) -> GrammarState:
        """A text that has `token_ids` already; its mask is on its way."""
        compiler = self._compiler = self._compiler or self._threads.submit(self._load)
        known = list(token_ids)

        def compile_and_replay() -> tuple[LLMatcher, Mask]:
            return _advance(compiler.result().compile(grammar), known)

        return GrammarState(self._threads, self._threads.submit(compile_and_replay))


class GrammarState:
    """One text's place in its grammar."""

    def __init__(self, threads: ThreadPoolExecutor, pending: Future[tuple[LLMatcher, Mask]]) -> None:
        self._threads, self._pending = threads, pending

    @property
    def ready(self) -> bool:
        """Whether the mask of the next token is there."""
        return self._pending.done() and self._pending.exception() is None

    @property
    def error(self) -> SplitserveError | None:
        """Why there will be no mask."""
        error = self._pending.exception() if self._pending.done() else None
        return error if error is None or isinstance(error, SplitserveError) else SplitserveError(f"grammar: {error!r}")

    @property
    def mask(self) -> Mask:
        """Of the next token; to be asked for when `ready`."""
        return self._pending.result()[1]

    def take(self, token_id: int) -> None:
        """The text goes on with `token_id`, which the mask allowed: the next mask is on its way."""
        matcher = self._pending.result()[0]
        self._pending = self._threads.submit(_advance, matcher, [token_id])


def wait_for_mask(states: Seq[GrammarState]) -> None:
    """Return when the mask of one of `states` is there, or after MASK_WAIT_S seconds."""
    wait([state._pending for state in states], MASK_WAIT_S, FIRST_COMPLETED)


def _advance(matcher: LLMatcher, token_ids: Seq[int]) -> tuple[LLMatcher, Mask]:
    if token_ids and not matcher.consume_tokens(list(token_ids)):
        raise InvalidRequest("answered", list(token_ids), "give what the grammar allows")
    return matcher, allowed_tokens(matcher)
