"""Pages of the docs site that are made of the code: the topology's fields, the commands, the benchmarks' rows.

MkDocs runs `on_files` as a hook, while it builds the site.
"""

from __future__ import annotations

import argparse
import io
import json
import posixpath
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from splitserve.cluster.topology_file import topology_json_schema
from splitserve.deploy.cli import make_parser

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)([^)#]+)\)")
Json = dict[str, Any]
Row = dict[str, Any]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is made."""
    pages: dict[str, str | bytes] = {
        "index.md": home((ROOT / "README.md").read_text()),
        "reference/topology.md": topology_page(topology_json_schema()),
        "reference/command-line.md": command_page(make_parser()),
        "split.png": (RESULTS / "split.png").read_bytes(),
    }
    rows = {file.stem: read_rows(file) for file in sorted(RESULTS.glob("*.jsonl"))}
    pages["reference/benchmarks.md"] = benchmark_page(rows)
    pages |= {f"reference/{bench}.svg": plot for bench in rows if (plot := ratio_plot(rows[bench]))}
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """What lies elsewhere in the repository is named, not linked."""
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def name(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link[2]))
        return link[0] if target.startswith("docs/") else f"{link[1]} (`{target}`)"

    return LINK.sub(name, markdown)


def home(readme: str) -> str:
    """The README as a page of docs/."""
    readme = readme.replace("(benchmarks/results/split.png)", "(split.png)")
    return LINK.sub(lambda link: f"[{link[1]}]({posixpath.relpath(link[2], 'docs')})", readme)


def topology_page(schema: Json) -> str:
    """Every field of a topology file, a table for each section."""
    lines = ["# Topology reference", "", "Made from the schema that `splitserve check` and editors use.", ""]
    lines += section("The file", "", schema)
    named = [(name, sub) for name, field in schema["properties"].items() for sub in references(field)]
    seen: set[str] = set()
    while named:
        path, name = named.pop(0)
        definition = schema["$defs"][name]
        if name in seen:
            continue
        seen.add(name)
        lines += section(f"`{path}`", definition.get("description", ""), definition)
        named += [
            (f"{path}.{each}", sub) for each, field in definition["properties"].items() for sub in references(field)
        ]
    return "\n".join(lines)


def section(title: str, description: str, schema: Json) -> list[str]:
    needed = schema.get("required", [])
    lines = [f"## {title}", "", description, "", "| Field | Values | Default | Meaning |", "|---|---|---|---|"]
    for name, field in schema["properties"].items():
        default = "needed" if name in needed else default_of(field)
        lines.append(f"| `{name}` | {values_of(field)} | {default} | {cell(field.get('description', ''))} |")
    return [*lines, ""]


def references(field: Json) -> list[str]:
    """The sections that a field is of."""
    options = [field, *field.get("anyOf", []), *field.get("allOf", [])]
    return [option["$ref"].rpartition("/")[2] for option in options if "$ref" in option]


def default_of(field: Json) -> str:
    if references(field):
        return "its section's"
    value = field.get("default")
    return "none" if value is None else f"`{json.dumps(value)}`"


def values_of(field: Json) -> str:
    """What a field may be, in words."""
    if references(field):
        return "a section"
    if "anyOf" in field:
        return " or ".join(values_of(option) for option in field["anyOf"] if option.get("type") != "null")
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if "pattern" in field:
        return "a size, such as `4GiB`" if "GiB" in field["pattern"] else "text"
    words = {
        "integer": "whole number",
        "number": "number",
        "string": "text",
        "boolean": "`true`, `false`",
        "array": "list",
    }
    return words.get(field.get("type", ""), "") + bounds(field)


def bounds(field: Json) -> str:
    low, high = field.get("minimum", field.get("exclusiveMinimum")), field.get("maximum")
    if low is None and high is None:
        return ""
    if high is None:
        return f", {'at least' if 'minimum' in field else 'above'} {low:g}"
    return f", {low if low is not None else ''} to {high:g}"


def command_page(parser: argparse.ArgumentParser) -> str:
    """The help of every command."""
    lines = ["# Command line", "", "What each command's `--help` says.", ""]
    for name, command in subcommands(parser):
        lines += [f"## {name}", "", "```", command.format_help().strip(), "```", ""]
    return "\n".join(lines)


def subcommands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                yield f"{parser.prog} {name}", command
                yield from subcommands(command)


def read_rows(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def benchmark_page(rows: dict[str, list[Row]]) -> str:
    """All rows, a table for each benchmark, and how each figure stands to its peer's."""
    lines = [
        "# Benchmarks",
        "",
        "The rows of `benchmarks/results`. A figure is a median, with the 10th and 90th percentile of what was seen;",
        "a peer is another system, a physical limit or another way of ours, measured in the same run where it can be.",
        "",
        "![Prefill and decode on a GPU each against two colocated replicas and vLLM](../split.png)",
        "",
    ]
    for bench, found in rows.items():
        lines += [f"## {bench}", ""]
        if any(row["ratio"] is not None for row in found):
            lines += [f"![Ratios of {bench} to their peers]({bench}.svg)", ""]
        lines += [
            "| Case | Metric | Figure | Spread | Peer | Ratio | Hardware | Commit |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [row_cells(row) for row in found]
        lines.append("")
    return "\n".join(lines)


def row_cells(row: Row) -> str:
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.3f}"
    peer = row["peer"] if row["peer_value"] is None else f"{row['peer']}: {row['peer_value']:.4g}"
    spread = f"{row['p10']:.4g} to {row['p90']:.4g}, n={row['n']}"
    figure = f"{row['value']:.4g} {row['unit']}"
    cells = (row["case"], row["metric"], figure, spread, peer, ratio, row["hardware"], row["commit"])
    return "| " + " | ".join(map(cell, cells)) + " |"


def ratio_plot(rows: Sequence[Row]) -> bytes:
    """How many times as good as their peers a benchmark's figures are, as SVG; nothing where there are no peers."""
    from matplotlib.figure import Figure

    by_metric: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for row in rows:
        if row["ratio"]:
            gain = row["ratio"] if row["better"] == "higher" else 1 / row["ratio"]
            by_metric[row["metric"]].append((row["case"], gain))
    if not by_metric:
        return b""
    bars = [(f"{case}: {metric}", gain) for metric, found in by_metric.items() for case, gain in found]
    figure = Figure(figsize=(10, 1 + 0.22 * len(bars)), layout="constrained")
    axes = figure.subplots()
    axes.barh(
        [name for name, _ in bars], [gain for _, gain in bars], color=["C0" if gain >= 1 else "C3" for _, gain in bars]
    )
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("times as good as the peer, log scale")
    figure.savefig(buffer := io.BytesIO(), format="svg", metadata={"Date": None})
    return buffer.getvalue()


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
