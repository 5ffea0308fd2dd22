"""What an answer must be, and the process that finds out whether that can be had (`router/grammar_check.py`)."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from splitserve.cluster.errors import InvalidRequest, Overloaded

MAX_CHARACTERS = 64 * 1024
MAX_REPLY_BYTES = 8 * 2**20
REMEMBERED = 64
MOST_WAITING = 32  # constraints; each may take CHECK_S seconds, and a process that is killed as many again
CHECK_AGAIN_S = 1.0

Kind = Literal["json_schema", "regex", "grammar", "choice"]


@dataclass(frozen=True)
class Constraint:
    """`text` is a JSON schema, a regular expression, a grammar (Lark or GBNF), or a JSON list of texts to choose from.

    `field` is what a request calls it.
    """

    kind: Kind
    text: str
    field: str = field(compare=False)

    @classmethod
    def choice(cls, texts: Sequence[str], field: str) -> Constraint:
        """One of `texts`. Raises InvalidRequest where there is none, or one is empty."""
        if not texts or not all(texts):
            raise InvalidRequest(field, list(texts), "give at least one text, and none that is empty")
        return cls("choice", json.dumps(list(texts)), field)


class GrammarChecker:
    """Makes grammars of constraints, for the tokenizer in `folder`: one at a time, in a process that may end."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self._command = (sys.executable, "-m", "splitserve.router.grammar_check", str(folder), str(vocab_size))
        self._process: Process | None = None
        self._turn = asyncio.Lock()
        self._known: OrderedDict[Constraint, dict[str, str]] = OrderedDict()
        self._waiting: Counter[Constraint] = Counter()

    async def grammar(self, constraint: Constraint) -> str:
        """The grammar for `SamplingParams.grammar`.

        Raises InvalidRequest naming the constraint's field, Overloaded where too many others wait.
        """
        if not 0 < len(constraint.text) <= MAX_CHARACTERS:
            expected = f"give 1 to {MAX_CHARACTERS} characters"
            raise InvalidRequest(constraint.field, f"{len(constraint.text)} characters", expected)
        reply = self._known.get(constraint) or await self._in_turn(constraint)
        self._known[constraint] = reply
        self._known.move_to_end(constraint)
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        if "error" in reply:
            raise InvalidRequest(constraint.field, constraint.text, reply["error"])
        return reply["grammar"]

    async def close(self) -> None:
        """End the process."""
        if self._process is not None:
            process, self._process = self._process, None
            if process.returncode is None:
                process.kill()
            await process.wait()

    async def _in_turn(self, constraint: Constraint) -> dict[str, str]:
        """What a checker says, or has said to another request meanwhile."""
        if constraint not in self._waiting and len(self._waiting) >= MOST_WAITING:
            raise Overloaded(f"{MOST_WAITING} constraints wait to be checked", CHECK_AGAIN_S)
        self._waiting[constraint] += 1
        try:
            async with self._turn:
                return self._known.get(constraint) or await self._ask(constraint)
        finally:
            self._waiting -= Counter([constraint])

    async def _ask(self, constraint: Constraint) -> dict[str, str]:
        """What a checker says. Raises Overloaded where two were killed, by the host for want of memory, say."""
        for _ in range(2):
            if reply := await self._try(constraint):
                return reply
        raise Overloaded("whatever checks grammars is killed; try again", CHECK_AGAIN_S)

    async def _try(self, constraint: Constraint) -> dict[str, str] | None:
        try:
            process = self._process = self._process or await self._start()
            assert process.stdin is not None
            request = {"kind": constraint.kind, "text": constraint.text}
            process.stdin.write(json.dumps(request).encode() + b"\n")
            if line := await _line(process):
                reply: dict[str, str] = json.loads(line)
                return reply
        except BaseException:
            await self.close()  # what it would still say is no answer to anything
            raise
        killed = await process.wait() in (-signal.SIGKILL, -signal.SIGTERM)
        await self.close()
        return None if killed else {"error": "it takes too much time or memory to compile; give a simpler one"}

    async def _start(self) -> Process:
        """Raises InvalidRequest where this cluster has no grammars."""
        process = await asyncio.create_subprocess_exec(*self._command, stdin=PIPE, stdout=PIPE, limit=MAX_REPLY_BYTES)
        ready = json.loads(await _line(process) or b'{"error": "its process ended"}')
        if "error" in ready:
            await process.wait()
            raise InvalidRequest("grammar", "no way to check one", ready["error"])
        return process


async def _line(process: Process) -> bytes:
    assert process.stdout is not None
    return await process.stdout.readline()
