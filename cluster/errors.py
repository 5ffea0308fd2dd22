"""Every error splitserve raises on purpose, and what to do about it.

SplitserveError
├── TopologyError          the topology file is wrong: mend the named line
├── TopologyErrors         the same, with all that was found
├── ModelLoadError         config, weights or tokenizer cannot be used: mend the named file
├── StartupError           a port, socket or process could not be had: free it or name another
│   └── InsufficientResources   too few CPUs, GPUs or bytes: ask for less or add hosts
├── InvalidRequest         the request's fault: mend the named field; a retry fails alike
├── Unauthenticated        no API key, or none that is known: send one that `keygen --api` made
├── NotFound               no such model, cluster or worker: name one that exists
├── Overloaded             no room now: retry after `retry_after_s`
├── DeadlineExceeded       the request's own deadline passed
├── RequestCancelled       the client went away or asked to stop
├── WorkerUnavailable      a worker died, hangs or is restarting: retry
├── GivenUp                the request lost its workers ten times: see what it does to them
├── ModelFailure           the model's output is not finite for this request: check the weights
├── TransferFailed         KV could not be moved in time: retry
└── ProtocolError          a peer sent what no version of splitserve sends: drop the message
"""

from __future__ import annotations

FIELD_CHARACTERS = 200


class SplitserveError(Exception):
    """Base of all errors raised on purpose. `code` is the gRPC status name that a client sees."""

    code = "INTERNAL"


class TopologyError(SplitserveError):
    """A topology file's fault, with the place, the finding and the remedy."""

    code = "INVALID_ARGUMENT"

    def __init__(self, file: str, line: int, field: str, found: str, expected: str) -> None:
        self.file, self.line, self.field, self.found, self.expected = file, line, field, found, expected
        super().__init__(f"{file}:{line}: {field}: found {found}; {expected}")


class TopologyErrors(SplitserveError):
    """All faults of one topology file, a line each."""

    code = "INVALID_ARGUMENT"

    def __init__(self, errors: list[TopologyError]) -> None:
        self.errors = tuple(errors)
        super().__init__("\n".join(str(error) for error in errors))


class ModelLoadError(SplitserveError):
    code = "FAILED_PRECONDITION"


class StartupError(SplitserveError):
    code = "FAILED_PRECONDITION"


class InsufficientResources(StartupError):
    """The cluster asks for more CPUs, GPUs or memory than there is."""


class InvalidRequest(SplitserveError):
    """A request's fault: `field` is wrong because of `found`; `expected` says what would be right.

    Both are the client's words where it made up a field, so neither makes the message long.
    """

    code = "INVALID_ARGUMENT"

    def __init__(self, field: str, found: object, expected: str) -> None:
        field = field if len(field) <= FIELD_CHARACTERS else f"{field[: FIELD_CHARACTERS - 3]}..."
        self.field, self.found, self.expected = field, found, expected
        super().__init__(f"{field}: found {_shorten(found)}; {expected}")

    def __reduce__(self) -> tuple[type[InvalidRequest], tuple[str, object, str]]:
        return type(self), (self.field, self.found, self.expected)


class Unauthenticated(SplitserveError):
    code = "UNAUTHENTICATED"


class NotFound(SplitserveError):
    code = "NOT_FOUND"


class Overloaded(SplitserveError):
    """No room for this request now; `retry_after_s` (seconds) says when to try again."""

    code = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class DeadlineExceeded(SplitserveError):
    code = "DEADLINE_EXCEEDED"


class RequestCancelled(SplitserveError):
    code = "CANCELLED"


class WorkerUnavailable(SplitserveError):
    code = "UNAVAILABLE"


class GivenUp(SplitserveError):
    """A request lost its workers so often that it may be what brings them down: it should not come again by itself."""

    code = "ABORTED"


class ModelFailure(SplitserveError):
    """The model gave no usable logits for a request."""


class TransferFailed(SplitserveError):
    code = "UNAVAILABLE"


class ProtocolError(SplitserveError):
    code = "INTERNAL"


def _shorten(found: object, limit: int = 80) -> str:
    text = repr(found)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"
