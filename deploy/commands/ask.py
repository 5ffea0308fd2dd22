"""generate, chat, demo, health: requests from the terminal. The answer goes to stdout, everything else to stderr."""

from __future__ import annotations

import argparse
import readline  # noqa: F401 (gives input() line editing and history)
import sys
import time

from rich.console import Console

from splitserve.client import Client, Completion, Sampling, Stream
from splitserve.cluster.errors import InvalidRequest
from splitserve.cluster.topology_file import load_topology_file
from splitserve.deploy.change import require_same
from splitserve.deploy.commands.connection import (
    add_connection,
    add_credentials,
    add_sampling,
    credentials,
    endpoint,
    sampling,
)
from splitserve.deploy.launch import launch, stop
from splitserve.deploy.progress import make_view
from splitserve.deploy.report import timing_table

QUESTION = "What is the capital of France, and what is it known for?"
DEMO_ANSWER = Sampling(temperature=0.0, seed=0, max_tokens=128)
DEMO_TEXT = Sampling(temperature=0.7, top_p=0.9, seed=0, max_tokens=128)
HEALTH_S = 5.0


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("generate", help="continue a text")
    parser.add_argument("--text", help="the prompt (default: standard input)")
    add_connection(parser)
    add_sampling(parser)
    parser.set_defaults(run=generate)

    parser = commands.add_parser("chat", help="ask a question, or talk line by line")
    parser.add_argument("question", nargs="?", help="ask this and return (default: read questions from the terminal)")
    parser.add_argument("--system", help="system message")
    add_connection(parser)
    add_sampling(parser)
    parser.set_defaults(run=chat)

    parser = commands.add_parser("demo", help="start a cluster, ask it one question and end it")
    parser.add_argument("file", metavar="FILE", help="topology file")
    parser.add_argument("--text", help="continue this text instead, for a model that was not taught to answer")
    add_credentials(parser)
    parser.set_defaults(run=demo)

    parser = commands.add_parser("health", help="ask a router whether it serves: exit status 0 if so, else 1")
    add_connection(parser)
    parser.set_defaults(run=health)


def generate(arguments: argparse.Namespace) -> int:
    prompt = sys.stdin.read() if arguments.text is None else arguments.text
    if not prompt:
        raise InvalidRequest("text", prompt, "give a prompt with --text or on standard input")
    chosen = sampling(arguments)
    with Client(endpoint(arguments), **credentials(arguments)) as client:
        show_answer(client.generate(prompt, **chosen), chosen)
    return 0


def chat(arguments: argparse.Namespace) -> int:
    messages = [{"role": "system", "content": arguments.system}] if arguments.system else []
    chosen = sampling(arguments)
    with Client(endpoint(arguments), **credentials(arguments)) as client:
        while question := arguments.question or _read_question():
            messages.append({"role": "user", "content": question})
            answer = show_answer(client.chat(messages, **chosen), chosen)
            messages.append({"role": "assistant", "content": answer.text})
            if arguments.question:
                break
    return 0


def demo(arguments: argparse.Namespace) -> int:
    file, text = load_topology_file(arguments.file), arguments.text
    began = time.monotonic()
    cluster = launch(file, None, make_view())
    if not cluster.is_new:
        require_same(cluster.state, file)
    try:
        print(f"ready after {time.monotonic() - began:.1f} s\n> {text or QUESTION}", file=sys.stderr, flush=True)
        with Client(cluster.state.endpoints[0], **credentials(arguments)) as client:
            if text:
                show_answer(client.generate(text, **DEMO_TEXT), DEMO_TEXT)
            else:
                show_answer(client.chat([{"role": "user", "content": QUESTION}], **DEMO_ANSWER), DEMO_ANSWER)
    finally:
        if cluster.is_new:
            stop(cluster.state)
    return 0


def health(arguments: argparse.Namespace) -> int:
    with Client(endpoint(arguments), **credentials(arguments)) as client:
        serves = client.healthy(timeout_s=HEALTH_S)
    print("serving" if serves else "not serving")
    return 0 if serves else 1


def show_answer(stream: Stream, chosen: Sampling) -> Completion:
    """Print the first sample as it arrives, the others when they are whole, then where the time went."""
    try:
        for delta in stream:
            if delta.index == 0:
                print(delta.text, end="", flush=True)
    except BaseException:
        stream.cancel()
        raise
    completion = stream.result()
    print(flush=True)
    for index, sample in enumerate(completion.samples[1:], start=1):
        print(f"--- {index}\n{sample.text}", flush=True)
    Console(stderr=True).print(timing_table(completion, chosen))
    return completion


def _read_question() -> str:
    """A line from the terminal; "" at its end."""
    try:
        return input("> ")
    except EOFError:
        return ""
