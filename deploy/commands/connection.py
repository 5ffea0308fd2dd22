"""Arguments that commands share: which cluster to ask, and how to sample."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import TypedDict

from splitserve.client import Sampling
from splitserve.cluster.errors import InvalidRequest, NotFound
from splitserve.cluster.sampling import SamplingParams
from splitserve.cluster.topology_sections import is_address
from splitserve.deploy.cluster_state import find_cluster

DEFAULTS = SamplingParams()
API_KEY = "SPLITSERVE_API_KEY"  # in the environment, since every user of a host sees the arguments of commands


class Credentials(TypedDict):
    """Arguments of `Client` and `AsyncClient`."""

    root_certificates: bytes | None
    certificate: tuple[bytes, bytes] | None
    api_key: str | None


def add_connection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--endpoint", metavar="HOST:PORT", help="router to ask (default: the running cluster's)")
    parser.add_argument("--cluster", metavar="NAME", help="cluster to ask (default: the only one)")
    add_credentials(parser)


def add_credentials(parser: argparse.ArgumentParser) -> None:
    """The arguments of `credentials`."""
    parser.add_argument("--root-certificates", type=Path, metavar="PEM", help="trust these and connect with TLS")
    parser.add_argument("--certificate", type=Path, metavar="PEM", help="show this one, where the router asks for one")
    parser.add_argument("--private-key", type=Path, metavar="PEM", help="of the certificate")


def endpoint(arguments: argparse.Namespace) -> str:
    """host:port of the router to ask. Raises NotFound where none is known."""
    return endpoints(arguments)[0]


def endpoints(arguments: argparse.Namespace) -> tuple[str, ...]:
    """host:port of each router. Raises NotFound where none is known."""
    if arguments.endpoint is not None:
        if not is_address(arguments.endpoint):
            raise InvalidRequest("endpoint", arguments.endpoint, "give host:port of a router, such as 127.0.0.1:50061")
        return (arguments.endpoint,)
    state = find_cluster(arguments.cluster)
    if not state.endpoints:
        raise NotFound(f"cluster {state.name} is not ready yet; `splitserve status` shows how far it is")
    return tuple(state.endpoints)


def credentials(arguments: argparse.Namespace) -> Credentials:
    """What the arguments of `add_credentials` and the environment say of trust, for a client."""
    chain, key = (_pem(name, getattr(arguments, name)) for name in ("certificate", "private_key"))
    if (chain is None) != (key is None):
        raise InvalidRequest("certificate", str(arguments.certificate), "give it together with --private-key")
    certificate = None if chain is None or key is None else (chain, key)
    return {
        "root_certificates": _pem("root_certificates", arguments.root_certificates),
        "certificate": certificate,
        "api_key": os.environ.get(API_KEY) or None,
    }


def _pem(name: str, path: Path | None) -> bytes | None:
    try:
        return path.read_bytes() if path else None
    except OSError as error:
        option = name.replace("_", "-")
        raise InvalidRequest(option, str(path), f"{error.strerror}: name a readable PEM file") from error


def add_deadline(parser: argparse.ArgumentParser, when: str = "", default: float | None = None) -> None:
    parser.add_argument(
        "--deadline",
        type=_seconds,
        default=default,
        metavar="SECONDS",
        help=f"{when}what a worker runs may take so long to end, and goes on with others then "
        f"(default: {'until it ends' if default is None else '%(default)s'})",
    )


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError
    return value


_seconds.__name__ = "number of seconds"  # argparse calls it that in its message


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Options named as the fields of SamplingParams, with its defaults."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=int, help="length of the answer (default: up to the context's end)")
    group.add_argument(
        "--min-tokens", type=int, default=DEFAULTS.min_tokens, help="no end before (default: %(default)s)"
    )
    group.add_argument(
        "--temperature", type=float, default=DEFAULTS.temperature, help="0 is greedy (default: %(default)s)"
    )
    group.add_argument(
        "--seed", type=int, default=DEFAULTS.seed, help="repeats a sampled answer (default: %(default)s)"
    )
    group.add_argument("--top-k", type=int, default=DEFAULTS.top_k, help="0 is all (default: %(default)s)")
    for name in ("top-p", "min-p", "repetition-penalty", "presence-penalty", "frequency-penalty"):
        default = getattr(DEFAULTS, name.replace("-", "_"))
        group.add_argument(f"--{name}", type=float, default=default, help="(default: %(default)s)")
    group.add_argument("-n", type=int, default=DEFAULTS.n, help="answers (default: %(default)s)")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends the answer; may be repeated")
    group.add_argument("--ignore-eos", action="store_true", help="go on to --max-tokens")


def sampling(arguments: argparse.Namespace) -> Sampling:
    """What the arguments of `add_sampling` say."""
    chosen = Sampling(
        min_tokens=arguments.min_tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        presence_penalty=arguments.presence_penalty,
        frequency_penalty=arguments.frequency_penalty,
        n=arguments.n,
        stop=arguments.stop,
        ignore_eos=arguments.ignore_eos,
    )
    if arguments.max_tokens is not None:
        chosen["max_tokens"] = arguments.max_tokens
    return chosen
