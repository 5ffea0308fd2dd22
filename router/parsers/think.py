"""Reasoning between `<think>` and `</think>`, as DeepSeek R1 and Qwen3 write it before their answers."""

from __future__ import annotations

from splitserve.router.parsers.pieces import held_back

OPENING, CLOSING = "<think>", "</think>"


class ThinkParser:
    """Splits a text into reasoning and answer. `inside`: the prompt has opened the reasoning already.

    Blanks around either are nothing; an answer without reasoning is as it was.
    """

    def __init__(self, inside: bool) -> None:
        self._state = "inside" if inside else "before"
        self._held = ""
        self._begun = False  # whether something of this part has been shown

    def push(self, text: str, *, last: bool) -> tuple[str, str]:
        """What is certain now of (reasoning, answer)."""
        self._held += text
        if self._state == "before":
            start = self._held.lstrip()
            if start.startswith(OPENING):
                self._state, self._held = "inside", start[len(OPENING) :]
            elif last or not OPENING.startswith(start):
                self._state, self._begun = "behind", True
        reasoning = ""
        if self._state == "inside":
            reasoning, tag, behind = self._held.partition(CLOSING)
            if tag:
                self._state, self._held = "behind", behind
            else:
                shown = reasoning if last else reasoning[: len(reasoning) - held_back(reasoning, CLOSING)]
                self._held = reasoning[len(shown.rstrip()) :]
                reasoning = shown
            reasoning = self._strip(reasoning)
            self._begun = self._begun and not tag
        if self._state != "behind":
            return reasoning, ""
        answer = self._held if self._begun else self._held.lstrip()
        self._held, self._begun = "", self._begun or bool(answer)
        return reasoning, answer

    def _strip(self, reasoning: str) -> str:
        reasoning = reasoning.rstrip() if self._begun else reasoning.strip()
        self._begun = self._begun or bool(reasoning)
        return reasoning
