from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from splitserve.deploy.garbage import collect_all, spare_what_is_there
from tests.worker_threads import running, topology


class Circle:
    """Refers to itself, so that only a collection frees it."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def thresholds() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    collect_all()
    gc.set_threshold(*before)


def test_what_is_there_is_spared_until_all_is_collected() -> None:
    before = Circle()
    spare_what_is_there()
    after = Circle()
    old, new = weakref.ref(before), weakref.ref(after)
    del before, after
    gc.collect()
    assert (old() is None, new() is None) == (False, True)
    collect_all()
    assert old() is None


def test_engines_spare_what_they_have_loaded_while_they_serve(tiny_model: Path) -> None:
    with running(topology(tiny_model, decode_tp=2)) as client:
        assert gc.get_freeze_count() > 100_000
        assert client.generate([5, 6, 7], max_tokens=4, ignore_eos=True).result().samples[0].token_ids
    assert gc.get_freeze_count() == 0
