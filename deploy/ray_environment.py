"""The environment that Ray reads when it is imported: set it first, and import Ray late."""

from __future__ import annotations

import os
from pathlib import Path


def prepare_ray(token: Path) -> None:
    """Have this process and its children authenticate: with a local Ray's `token` file, or the user's own if none.

    Joining a Ray without authentication takes RAY_AUTH_MODE=disabled in the user's environment.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if token.exists():
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
