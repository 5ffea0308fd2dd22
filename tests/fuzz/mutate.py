"""What the fuzzers share: settings, the corpus, limits, and strategies that spoil something valid.

`corpus(decoder)` holds valid inputs, which mutation starts from, and each input that once did harm, named by what it
did. Every run replays all of them first.
"""

from __future__ import annotations

import contextlib
import copy
import os
import resource
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

T = TypeVar("T")

CORPUS = Path(__file__).parent / "corpus"

settings.register_profile(
    "ci", derandomize=True, max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
settings.register_profile("long", settings.get_profile("ci"), derandomize=False, max_examples=20_000, print_blob=True)
fuzz = settings.get_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))  # a decorator

EDGES = sorted(
    {
        sign * (2**bits) + more
        for bits in (0, 7, 8, 15, 16, 31, 32, 53, 60, 63)
        for sign in (1, -1)
        for more in (-1, 0, 1)
    }
)
INTEGERS = st.sampled_from(EDGES) | st.integers(-(2**63), 2**64 - 1) | st.integers(-5, 300)
FLOATS = st.sampled_from([float("nan"), float("inf"), float("-inf"), -0.0, 1e-320, 1e308]) | st.floats()
TEXTS = st.text(max_size=8) | st.sampled_from(["", "\0", "../x", "\ud800", "{{ x }}", "9" * 5000, "a" * 70_000])
ODD: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | INTEGERS | FLOATS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=4,
)


def corpus(decoder: str) -> list[Path]:
    return sorted((CORPUS / decoder).iterdir())


def seeds(decoder: str) -> list[bytes]:
    return [path.read_bytes() for path in corpus(decoder)]


class _TooSlow(BaseException):
    """No Exception, so that no handler of the code under test takes it."""


@contextlib.contextmanager
def bounded(seconds: float = 2.0, memory: int = 512 << 20) -> Iterator[None]:
    """What runs inside may take so much processor time and so much more memory; beyond that it fails."""

    def stop(*_: object) -> None:
        raise _TooSlow

    before = signal.signal(signal.SIGVTALRM, stop)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, hard))
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    except _TooSlow:
        raise AssertionError(f"took more than {seconds} s") from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGVTALRM, before)


@st.composite
def mutated(draw: st.DrawFn, valid: Sequence[bytes]) -> bytes:
    """One of `valid` with a few bytes flipped, cut, repeated, spliced in, or a length replaced."""
    data = draw(st.sampled_from(valid))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        stop = draw(st.integers(start, min(len(data), start + 64)) | st.integers(start, len(data)))
        match draw(st.sampled_from(["flip", "cut", "end", "repeat", "splice", "number", "bytes"])):
            case "flip" if start < len(data):
                data = data[:start] + bytes([data[start] ^ 1 << draw(st.integers(0, 7))]) + data[start + 1 :]
            case "cut":
                data = data[:start] + data[stop:]
            case "end":
                data = data[:start]
            case "repeat":
                data = data[:stop] + data[start:stop] * draw(st.integers(1, 3)) + data[stop:]
            case "splice":
                other = draw(st.sampled_from(valid))
                data = data[:start] + other[draw(st.integers(0, len(other))) :]
            case "number":
                width, order = draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from(["little", "big"]))
                number = draw(INTEGERS) % 2 ** (8 * width)
                data = data[:start] + number.to_bytes(width, order) + data[start + width :]
            case _:
                data = data[:start] + draw(st.binary(max_size=8)) + data[stop:]
    return data


@st.composite
def changed(draw: st.DrawFn, valid: Sequence[T], odd: st.SearchStrategy[Any] = ODD) -> T:
    """One of `valid`, trees of lists and dictionaries, with up to three values replaced, left out or taken twice."""
    tree = copy.deepcopy(draw(st.sampled_from(valid)))
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(tree))
        if not places:
            break
        holder, key = draw(st.sampled_from(places))
        match draw(st.sampled_from(["alike", "alike", "alike", "alike", "replace", "drop", "other", "add"])):
            case "alike":
                holder[key] = draw(_alike(holder[key], odd))
            case "replace":
                holder[key] = draw(odd)
            case "drop":
                del holder[key]
            case "other":
                other, name = draw(st.sampled_from(places))
                holder[key] = copy.deepcopy(other[name])
            case _ if isinstance(holder, list):
                holder.insert(key, draw(odd))
            case _:
                holder[draw(TEXTS)] = draw(odd)
    return tree


def _alike(value: Any, odd: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Values of the same type, which get past the first checks."""
    by_type = {bool: st.booleans(), int: INTEGERS, float: FLOATS, str: TEXTS}
    if isinstance(value, list) and value:
        return st.lists(st.sampled_from(value), max_size=4)
    return by_type.get(type(value), odd)


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key or index) in `tree`."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield tree, key
        yield from _places(tree[key])
