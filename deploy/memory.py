"""What supervisors of a cluster leave to those that come after them, kept by Ray's control store while Ray lives."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import TypeAdapter
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

from splitserve.deploy.desired import Desired
from splitserve.deploy.units import Unit

UNITS = TypeAdapter(tuple[Unit, ...])


class Memory:
    """What is desired of `cluster`, and the units that were started for it."""

    def __init__(self, cluster: str) -> None:
        self._namespace = f"splitserve/{cluster}".encode()

    def desired(self) -> Desired | None:
        data = _internal_kv_get(b"desired", namespace=self._namespace)
        return None if data is None else Desired.model_validate_json(data)

    def keep_desired(self, desired: Desired) -> None:
        _internal_kv_put(b"desired", desired.model_dump_json().encode(), overwrite=True, namespace=self._namespace)

    def started(self) -> tuple[Unit, ...]:
        data = _internal_kv_get(b"started", namespace=self._namespace)
        return () if data is None else UNITS.validate_json(data)

    def keep_started(self, units: Iterable[Unit]) -> None:
        _internal_kv_put(b"started", UNITS.dump_json(tuple(units)), overwrite=True, namespace=self._namespace)

    def forget(self) -> None:
        for key in (b"desired", b"started"):
            _internal_kv_del(key, namespace=self._namespace)
