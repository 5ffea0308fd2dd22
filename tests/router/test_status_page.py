"""The status page: what it is made of, and what a real browser makes of it."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from splitserve.router import status_page
from splitserve.router.fake_cluster import FakeCluster
from splitserve.router.fake_engine import Behaviour
from splitserve.router.http_server import HttpServer
from splitserve.router.service import RouterService
from splitserve.router.status_page import HEADERS, PAGE
from splitserve.router.v1 import splitserve_pb2 as pb
from tests.ports import free_port
from tests.router.routers import running_router

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (Debian's package `chromium`)")
HOSTILE = '<img src="x" onerror="document.title=1"><script>document.title = "taken over"</script>'


def with_router(scenario: Callable[[RouterService], Awaitable[None]]) -> None:
    async def run() -> None:
        async with running_router(cluster) as (service, client):
            await client.generate([5, 6, 7], max_tokens=9).result()
            await scenario(service)

    with FakeCluster(behaviour=Behaviour(step_s=0.01)) as cluster:
        asyncio.run(run())


async def get(address: str | None, path: str) -> httpx2.Response:
    async with httpx2.AsyncClient() as http:
        return await http.get(f"http://{address}{path}")


def test_status_is_told_in_plain_json() -> None:
    async def scenario(service: RouterService) -> None:
        await asyncio.sleep(1.2)  # the next stats of engines
        status = (await get(service.http_address, "/status.json")).json()
        assert (status["cluster"], status["model"], status["queued_requests"]) == ("test", "tiny", 0)
        assert status["recent_requests"] == 1
        assert 0 < status["ttft"]["p50_s"] <= status["ttft"]["p99_s"]
        engines = {engine["name"]: engine for engine in status["engines"]}
        assert {engine["state"] for engine in engines.values()} == {"ready"}
        assert engines["decode/0/0"]["output_tokens"] == 8
        assert engines["decode/0/0"]["role"] == "decode"

    with_router(scenario)


def test_the_page_may_run_its_own_script_and_nothing_else() -> None:
    async def scenario(service: RouterService) -> None:
        answer = await get(service.http_address, "/")
        assert answer.text == PAGE
        policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
        assert policy["connect-src"] == "'self'"
        assert re.fullmatch(r"'sha256-[\w+/]{43}='", policy["script-src"])
        assert answer.headers["x-content-type-options"] == "nosniff"

    with_router(scenario)
    assert not re.search(r"https?://|innerHTML|\son\w+=|<link|<img|src=", PAGE), "nothing from elsewhere, no markup"


def browse(url: str, folder: Path) -> tuple[str, str]:
    """The page's markup after four of its seconds, and what the browser's console says."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        f"--user-data-dir={folder}", "--virtual-time-budget=4000", "--enable-logging=stderr", "--dump-dom", url,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def rows(markup: str) -> list[list[str]]:
    body = markup[markup.index("<tbody") : markup.index("</tbody>")]
    return [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in re.findall("<tr>(.*?)</tr>", body)]


@in_a_browser
def test_a_browser_shows_engines_and_latencies(tmp_path: Path) -> None:
    async def scenario(service: RouterService) -> None:
        markup, console = await asyncio.to_thread(browse, f"http://{service.http_address}/", tmp_path)
        assert "<title>test · splitserve" in markup
        assert '<h1 id="title">test: tiny</h1>' in markup
        assert [row[:2] for row in rows(markup)] == [["decode/0/0", "ready"], ["prefill/0/0", "ready"]]
        assert rows(markup)[0][2:5] == ["0 / 1,024".replace(",", ""), "0", "0%"]
        assert re.search(r"<dt>TTFT p50 / p99</dt><dd>[\d.,]+ / [\d.,]+ ms</dd>", markup)
        assert re.search(r'id="problem" role="alert"></p>', markup)
        assert console == ""

    with_router(scenario)


async def serve(tmp_path: Path, status: Callable[[], pb.StatusResponse], page: str = PAGE) -> tuple[str, str]:
    """What a browser makes of `page` with a router that says `status`."""

    async def changed(request: Request) -> Response:
        return Response(page, headers=HEADERS, media_type="text/html")

    address = f"127.0.0.1:{free_port()}"
    server = HttpServer(Starlette(routes=[Route("/page", changed), *status_page.routes(status)]), address, 16)
    server.start()
    try:
        return await asyncio.to_thread(browse, f"http://{address}/page", tmp_path)
    finally:
        await server.stop()


def status_of(name: str) -> pb.StatusResponse:
    engine = pb.Engine(name=name, role="decode", state=pb.ENGINE_STATE_SILENT, incarnation="1")
    return pb.StatusResponse(cluster=name, model=name, version=name, engines=[engine])


@in_a_browser
def test_names_are_text_to_a_browser(tmp_path: Path) -> None:
    markup, _ = asyncio.run(serve(tmp_path, lambda: status_of(HOSTILE)))
    assert '&lt;img src="x" onerror=' in markup
    assert "<img" not in markup
    assert "taken over" not in re.findall("<title>(.*?)</title>", markup)


@in_a_browser
def test_a_browser_runs_no_script_that_is_not_the_pages_own(tmp_path: Path) -> None:
    page = PAGE.replace("<h1", "<script>document.body.append('taken over')</script><h1")
    markup, console = asyncio.run(serve(tmp_path, lambda: status_of("decode/0/0"), page))
    assert markup.count("taken over") == 1, "its text, and not what it would have written"
    assert "Content Security Policy" in console
    assert [row[:2] for row in rows(markup)] == [["decode/0/0", "silent"]], "the page's own went on"


@in_a_browser
def test_a_router_that_stops_answering_is_said_to(tmp_path: Path) -> None:
    asked: list[int] = []

    def status() -> pb.StatusResponse:
        asked.append(1)
        if len(asked) > 1:
            raise RuntimeError("gone")
        return status_of("decode/0/0")

    markup, _ = asyncio.run(serve(tmp_path, status))
    assert len(asked) > 2, "it goes on asking"
    assert "The router does not answer (status 500); what is shown is old." in markup
    assert [row[0] for row in rows(markup)] == ["decode/0/0"]


def test_every_kind_of_field_is_plain() -> None:
    message: Any = status_page.plain(status_of("a"))
    assert message["engines"][0] == {
        **{field.name: 0 for field in pb.Engine.DESCRIPTOR.fields},
        "name": "a",
        "role": "decode",
        "state": "silent",
        "incarnation": "1",
    }
    assert message["ttft"] == {"p50_s": 0.0, "p99_s": 0.0}
