"""MessagePack coding of frozen dataclasses, checked on arrival.

A message travels as the array [type name, field, field, ...]. `unpack` builds only registered types and checks every
field against its annotation, so that nothing a peer sends can surprise the code behind it. Supported annotations:
bool, int, float, str, bytes, Literal, X | None, tuple[X, ...], tuple[X, Y], list[X], dict[K, V] and registered
dataclasses.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from operator import attrgetter
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgpack

from splitserve.cluster.errors import ProtocolError

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
ARRAY_32, JOIN_BYTES = b"\xdd", 5  # MessagePack's mark of an array, with which and the number of its items it begins

T = TypeVar("T")
Check = Callable[[Any], Any]
_registry: dict[str, type] = {}
_field_names: dict[type, tuple[str, ...]] = {}
_field_values: dict[type, Callable[[Any], tuple[object, ...]]] = {}
_builders: dict[type, Callable[[list[Any]], Any]] = {}


def message(cls: type[T]) -> type[T]:
    """Register a frozen dataclass as a wire type, under its class name."""
    if not is_dataclass(cls) or not cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise TypeError(f"{cls.__name__} must be a frozen dataclass")
    if cls.__name__ in _registry:
        raise TypeError(f"two wire types are named {cls.__name__}")
    _registry[cls.__name__] = cls
    _field_names[cls] = names = tuple(field.name for field in fields(cls))
    _field_values[cls] = attrgetter(*names) if len(names) > 1 else lambda item: tuple(getattr(item, it) for it in names)
    return cls


def pack(item: object) -> bytes:
    """Encode a registered message. Raises TypeError for anything else."""
    data: bytes = msgpack.packb(item, default=_encode)
    return data


def join(packed: Sequence[bytes]) -> bytes:
    """Messages that `pack` has encoded, as one array for `unpack_all`: JOIN_BYTES more than they have."""
    return b"".join((ARRAY_32, len(packed).to_bytes(4, "big"), *packed))


def unpack(data: bytes | memoryview) -> Any:
    """Decode and check one message. Raises ProtocolError for anything that is not exactly one valid message."""
    return _checked(data, _decode)


def unpack_all(data: bytes | memoryview) -> list[Any]:
    """Decode and check messages that were joined. Raises ProtocolError unless all of them are valid."""
    return _checked(data, _decode_all)


def _checked(data: bytes | memoryview, decode: Callable[[Any], T]) -> T:
    if len(data) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"message of {len(data)} bytes exceeds {MAX_MESSAGE_BYTES}")
    try:
        raw = msgpack.unpackb(data, use_list=True, strict_map_key=False)
    except Exception as error:  # msgpack raises a dozen unrelated types on malformed input
        raise ProtocolError(f"not MessagePack: {error}") from error
    try:
        return decode(raw)
    except (TypeError, ValueError, RecursionError) as error:
        raise ProtocolError(str(error)) from error


def _encode(item: object) -> list[object]:
    values = _field_values.get(type(item))
    if values is None:
        raise TypeError(f"{type(item).__name__} is not a wire type")
    return [type(item).__name__, *values(item)]


def _decode(raw: Any, expected: type | None = None) -> Any:
    if type(raw) is not list or not raw or type(raw[0]) is not str:
        raise TypeError(f"expected a message, found {type(raw).__name__}")
    cls = _registry.get(raw[0])
    if cls is None or (expected is not None and cls is not expected):
        raise TypeError(f"unexpected message type {raw[0][:80]!r}")
    build = _builders.get(cls) or _compile(cls)
    if len(raw) != len(_field_names[cls]) + 1:
        raise TypeError(f"{cls.__name__}: {len(raw) - 1} fields, expected {len(_field_names[cls])}")
    return build(raw)


def _decode_all(raw: Any) -> list[Any]:
    if type(raw) is not list:
        raise TypeError(f"expected an array of messages, found {type(raw).__name__}")
    return [_decode(each) for each in raw]


def _compile(cls: type) -> Callable[[list[Any]], Any]:
    """A function that makes a `cls` of its array. It is written out, because engines say a thousand things a second."""
    hints, names = get_type_hints(cls), _field_names[cls]
    scope: dict[str, Any] = {"cls": cls}
    lines = ["def build(raw):", f"    {' '.join(f'{name},' for name in ('_', *names))} = raw"]
    for name in names:
        scope[f"plain_{name}"], scope[f"check_{name}"] = _plain(hints[name]), _field_check(cls, name, hints[name])
        lines.append(f"    if type({name}) is not plain_{name}: {name} = check_{name}({name})")
    exec("\n".join([*lines, f"    return cls({', '.join(names)})"]), scope)
    _builders[cls] = build = scope["build"]
    return build  # type: ignore[no-any-return]


def _plain(hint: Any) -> type:
    """The type whose values need no check: of an optional field, that of None."""
    if hint in (bool, int, str, bytes):
        return hint  # type: ignore[no-any-return]
    return types.NoneType if types.NoneType in get_args(hint) else _Nothing


class _Nothing:
    """The type of no value that travels."""


def _field_check(cls: type, name: str, hint: Any) -> Check:
    check = _checker(hint)

    def named(raw: Any) -> Any:
        try:
            return check(raw)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{cls.__name__}.{name}: {error}") from error

    return named


def _checker(hint: Any) -> Check:
    origin, args = get_origin(hint), get_args(hint)
    if hint in (bool, int, str, bytes):
        return _exactly(hint)
    if hint is float:
        return _float
    if origin is Literal:
        return _one_of(args)
    if origin in (Union, types.UnionType):
        return _optional(hint, args)
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        return _sequence(_checker(args[0]), args[0], tuple)
    if origin is tuple:
        return _fixed_tuple([_checker(arg) for arg in args])
    if origin is list:
        return _sequence(_checker(args[0]), args[0], list)
    if origin is dict:
        return _mapping(_checker(args[0]), _checker(args[1]))
    if hint in _field_names:
        return partial(_decode, expected=hint)
    raise TypeError(f"{hint} cannot travel in a message")


def _exactly(kind: type) -> Check:
    def check(raw: Any) -> Any:
        if type(raw) is not kind:
            raise TypeError(f"expected {kind.__name__}, found {type(raw).__name__}")
        return raw

    return check


def _float(raw: Any) -> float:
    if type(raw) not in (float, int):
        raise TypeError(f"expected float, found {type(raw).__name__}")
    if raw != raw:  # NaN compares to nothing: a lease of it would never end
        raise ValueError("expected a number, found nan")
    return float(raw)


def _one_of(choices: tuple[Any, ...]) -> Check:
    def check(raw: Any) -> Any:
        if not any(raw == choice and type(raw) is type(choice) for choice in choices):
            raise ValueError(f"expected one of {choices}, found {raw!r:.80}")
        return raw

    return check


def _optional(hint: Any, args: tuple[Any, ...]) -> Check:
    inner = [arg for arg in args if arg is not type(None)]
    if len(inner) != 1 or len(args) != 2:
        raise TypeError(f"{hint} cannot travel in a message")
    check = _checker(inner[0])
    return lambda raw: None if raw is None else check(raw)


def _sequence(check: Check, item: Any, build: Callable[[Any], Any]) -> Check:
    def check_all(raw: Any) -> Any:
        if type(raw) is not list:
            raise TypeError(f"expected a list, found {type(raw).__name__}")
        if item is int:  # the common case, token ids and pages, at C speed
            if raw and set(map(type, raw)) != {int}:
                raise TypeError("expected a list of int")
            return build(raw)
        return build([check(value) for value in raw])

    return check_all


def _fixed_tuple(checks: list[Check]) -> Check:
    def check_each(raw: Any) -> Any:
        if type(raw) is not list or len(raw) != len(checks):
            raise TypeError(f"expected {len(checks)} values")
        return tuple(check(value) for check, value in zip(checks, raw, strict=True))

    return check_each


def _mapping(key: Check, value: Check) -> Check:
    def check_items(raw: Any) -> Any:
        if type(raw) is not dict:
            raise TypeError(f"expected a map, found {type(raw).__name__}")
        return {key(name): value(item) for name, item in raw.items()}

    return check_items
