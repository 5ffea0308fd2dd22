"""Who asks: the holders of API keys, and how much of the cluster each may take.

A router counts for itself. Of a key it knows what the file of `security.api_keys` has: name, hash and limits.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from splitserve.cluster.api_key_file import ApiKey, hash_key, read_api_keys
from splitserve.cluster.errors import InvalidRequest, Overloaded, Unauthenticated
from splitserve.router.policy import ANSWER_TOKENS
from splitserve.router.renewal import Renewed

BUSY_RETRY_S = 1.0
MINUTE_S = 60.0
SMOOTHING = 0.1

Clock = Callable[[], float]


class Allowance:
    """What flows in at `per_minute` and may gather for a minute; None is no end of it."""

    def __init__(self, per_minute: int | None, clock: Clock) -> None:
        self._per_minute, self._clock = per_minute, clock
        self._left, self._at = float(per_minute or 0), clock()

    def wait_s(self, amount: float) -> float:
        """Seconds until `amount` is there."""
        if self._per_minute is None:
            return 0.0
        now = self._clock()
        flowed = (now - self._at) * self._per_minute / MINUTE_S
        self._left, self._at = min(self._left + flowed, float(self._per_minute)), now
        return max(amount - self._left, 0.0) * MINUTE_S / self._per_minute

    def take(self, amount: float) -> None:
        """Take it, be it there or not: what lacks is waited for by the next one."""
        self._left -= amount


class Tenant:
    """A key's holder. `name` is empty where the cluster asks for no keys."""

    def __init__(self, name: str, key: ApiKey | None, clock: Clock) -> None:
        self.name, self.key = name, key
        self._most = key.concurrent if key else None
        self._requests = Allowance(key.requests_per_minute if key else None, clock)
        self._tokens = Allowance(key.tokens_per_minute if key else None, clock)
        self._running = 0
        self._answer_tokens = float(ANSWER_TOKENS)  # smoothed, of a sample

    @contextmanager
    def request(self, prompt_tokens: int, answers: int = 1) -> Iterator[None]:
        """Count as a request that runs, for so many answers. Raises Overloaded where the limits have no room for it.

        Tokens are counted as they come, `prompt_tokens` first: whoever has some left may ask for more than that.
        InvalidRequest: there will never be room.
        """
        if self._most is not None and answers > self._most:
            raise InvalidRequest("n", f"{answers} answers", f"{self.name} may have {self._most} under way at once")
        if self._most is not None and self._running + answers > self._most:
            raise Overloaded(f"{self.name} has {self._running} answers under way of {self._most}", BUSY_RETRY_S)
        self.take_request()
        self._tokens.take(prompt_tokens)
        self._running += answers
        try:
            yield
        finally:
            self._running -= answers

    def check(self) -> None:
        """Raises Overloaded where the holder has nothing left for this minute."""
        for what, allowance in (("requests", self._requests), ("tokens", self._tokens)):
            if wait_s := allowance.wait_s(1):
                raise Overloaded(f"{self.name} has no {what} left for this minute", wait_s)

    def take_request(self) -> None:
        """Count a request. Raises what `check` does."""
        self.check()
        self._requests.take(1)

    def take_tokens(self, count: int) -> None:
        """Count tokens of an answer."""
        self._tokens.take(count)

    def answer_tokens(self, max_tokens: int | None) -> float:
        """How many an answer that may have `max_tokens` is likely to have, by those of late."""
        return min(self._answer_tokens, max_tokens or self._answer_tokens)

    def answered(self, tokens: float) -> None:
        """An answer had so many: that is what shares go by, not what was asked for."""
        self._answer_tokens += SMOOTHING * (tokens - self._answer_tokens)


class Tenants:
    """All holders of keys in a file; without one, everybody is the same tenant. Raises StartupError for a bad file."""

    def __init__(self, path: str | None, clock: Clock = time.monotonic) -> None:
        self._clock, self._anybody = clock, Tenant("", None, clock)
        self._known: dict[str, Tenant] = {}
        self._tenants = None if path is None else Renewed([path], lambda: self._load(Path(path)))

    def find(self, authorization: str | None) -> Tenant:
        """Who sends an Authorization header. Raises Unauthenticated."""
        if self._tenants is None:
            return self._anybody
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise Unauthenticated("this cluster asks for an API key; send it as `Authorization: Bearer KEY`")
        presented, found = hash_key(key.strip()), None
        for tenant in self._tenants.newest():  # all of them, so that time tells nothing
            if tenant.key is not None and hmac.compare_digest(tenant.key.sha256, presented):
                found = tenant
        if found is None:
            raise Unauthenticated("this cluster does not know that API key")
        return found

    def _load(self, path: Path) -> list[Tenant]:
        """Those whose sections stayed as they were go on counting."""
        keys, known = read_api_keys(path), self._known
        same = {name for name, key in keys.items() if name in known and known[name].key == key}
        self._known = {
            name: known[name] if name in same else Tenant(name, key, self._clock) for name, key in keys.items()
        }
        return list(self._known.values())
