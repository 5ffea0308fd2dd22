"""Tables for people: where a request's time went, and what runs in a cluster."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Column, Table

from splitserve.client import Completion, Sampling
from splitserve.cluster.sampling import SamplingParams
from splitserve.deploy.status import ClusterStatus, UnitStatus

DEFAULTS = SamplingParams()
STATE_STYLES = {"ready": "green", "failed": "red", "down": "red", "drained": "dim"}


def timing_table(completion: Completion, sampling: Sampling) -> Table:
    """One request: its phases in the order they pass, then its latencies and sizes."""
    summary, usage, timings = completion.summary, completion.summary.usage, completion.summary.timings
    title = f"where the time went ({describe_sampling(sampling)})"
    table = Table("phase", Column("time", justify="right"), "of", title=title, title_justify="left")
    table.add_row("queue", _ms(timings.queue_s), completion.request_id)
    table.add_row("prefill", _ms(timings.prefill_s), f"{usage.prompt_tokens} tokens, {usage.cached_tokens} cached")
    table.add_row(
        "KV transfer",
        _ms(timings.kv_transfer_s),
        f"{summary.prefill_engine} to {summary.decode_engine}",
    )
    table.add_row("decode", _ms(timings.decode_s), f"{usage.completion_tokens} tokens")
    table.add_section()
    table.add_row("TTFT", _ms(timings.ttft_s), "the first token")
    table.add_row("TPOT", _ms(timings.tpot_s), "each token after it")
    rate = usage.completion_tokens / timings.total_s if timings.total_s else 0.0
    table.add_row("total", _ms(timings.total_s), f"{rate:,.1f} tokens/s")
    return table


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms"


def describe_sampling(sampling: Sampling) -> str:
    """Temperature and seed in words, defaults included."""
    temperature = sampling.get("temperature", DEFAULTS.temperature)
    greedy = " (greedy)" if temperature == 0 else ""
    return f"temperature {temperature:g}{greedy}, seed {sampling.get('seed', DEFAULTS.seed)}"


def status_table(status: ClusterStatus) -> Table:
    """A row for each engine and router of a cluster."""
    caption = f"KV transfer: {status.kv_path}"
    table = Table(title=f"cluster {status.name}", title_justify="left", caption=caption, caption_justify="left")
    for column in ("unit", "role", "state", "pids", "endpoint", "deaths", "last death"):
        table.add_column(column)
    for unit in status.units:
        pids = ", ".join(str(worker.pid) for worker in unit.workers)
        told = escape(unit.endpoint), str(unit.deaths), escape(unit.reason)
        table.add_row(unit.name, unit.role, _state(unit), pids, *told)
    return table


def _state(unit: UnitStatus) -> str:
    done, total = unit.tensors
    loading = f" {done}/{total}" if unit.state == "loading" else ""
    style = STATE_STYLES.get(unit.state, "yellow")
    return f"[{style}]{unit.state}{loading}[/{style}]"
