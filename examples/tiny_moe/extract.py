"""Plain text out of the files of packages: HTML, manual pages, POD, WordNet, and a few single formats.

Every public `*_texts` function turns the bytes of one file into the texts of the documents in it. `clean` then makes
one plain style of them: simple quotes and dashes, no control characters, no tables of numbers.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import unicodedata
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

INSTALL = {"mandoc": "mandoc", "pod2text": "perl", "dpkg-deb": "dpkg", "apt-get": "apt"}  # tool -> Debian package
VOID_TAGS = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
BLOCK_TAGS = {"blockquote", "body", "dd", "div", "dl", "dt", "h1", "h2", "h3", "h4", "h5", "h6", "main", "ol", "p"}
BLOCK_TAGS |= {"pre", "section", "table", "ul"}
HIDDEN_TAGS = {"button", "form", "footer", "head", "nav", "noscript", "script", "style", "svg", "template", "title"}
HIDDEN_CLASSES = {"boring", "contents", "fancy_toc", "headerlink", "linenos", "mainmenu", "navfooter", "navheader"}
HIDDEN_CLASSES |= {"related", "rightsidebar", "searchmenu", "sphinxsidebar", "toc", "toctree-wrapper"}
SIMPLE = str.maketrans(
    {"‘": "'", "’": "'", "‚": "'", "“": '"', "”": '"', "„": '"', "′": "'", "‐": "-", "‑": "-", "–": "-", "—": "--"}
    | {"−": "-", "…": "...", "•": "*", "·": "*", "\xa0": " ", "\u2009": " ", "\u200b": "", "\xad": "", "\ufeff": ""}
)
BOX = re.compile("[\u2500-\u257f]+")
MAIL = re.compile(r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)*\.[a-z]{2,6}\b(?!\()")
OTHER_TERMS = re.compile(rb"All advertising materials|reprinted and reproduced")  # BSD-4-Clause; the POSIX standard
GENERATED = re.compile(r"auto-?generated|generated (by|from)|do not edit", re.IGNORECASE)
WORD_CLASSES = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}


class CorpusError(Exception):
    """The corpus can't be built: a tool or a package is missing, or a package is not the pinned one."""


def run_tool(command: list[str], stdin: bytes = b"", cwd: Path | None = None) -> bytes:
    """What `command` prints. CorpusError if it is missing or fails."""
    if shutil.which(command[0]) is None:
        raise CorpusError(f"{command[0]} is missing: apt-get install {INSTALL.get(command[0], command[0])}")
    done = subprocess.run(command, input=stdin, capture_output=True, cwd=cwd, check=False)
    if done.returncode:
        raise CorpusError(f"{' '.join(command)} failed: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def decoded(raw: bytes) -> str:
    """UTF-8, or Latin-1 where it isn't."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")


class _HtmlText(HTMLParser):
    """Collects the visible text; the main part alone, where the page marks one."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._open: list[tuple[str, bool]] = []  # (tag, hidden) of the open elements
        self._main: int | None = None  # the depth of the main element
        self._done = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in VOID_TAGS:
            self._break({"br": "\n", "hr": "\n\n"}.get(tag, ""))
            return
        attributes = dict(attrs)
        if self._main is None and (tag == "main" or attributes.get("role") == "main"):
            self._main = len(self._open)
            self.parts.clear()
        hidden = tag in HIDDEN_TAGS or not HIDDEN_CLASSES.isdisjoint((attributes.get("class") or "").split())
        self._open.append((tag, hidden))
        if tag == "li":
            self._break("\n")
            self._add("- ")
        elif tag in BLOCK_TAGS:
            self._break("\n\n")
        elif tag == "tr":
            self._break("\n")
        elif tag in {"td", "th"}:
            self._add("  ")

    def handle_endtag(self, tag: str) -> None:
        depths = [depth for depth, (name, _) in enumerate(self._open) if name == tag]
        if not depths:
            return
        del self._open[depths[-1] :]
        if tag in BLOCK_TAGS:
            self._break("\n\n")
        if self._main is not None and len(self._open) <= self._main:
            self._done = True

    def handle_data(self, data: str) -> None:
        if not any(tag == "pre" for tag, _ in self._open):
            data = re.sub(r"\s+", " ", data)
            if not self.parts or self.parts[-1][-1].isspace():
                data = data.lstrip()
        self._add(data)

    def _break(self, newlines: str) -> None:
        if self.parts and self.parts[-1] != "- ":
            self._add(newlines)

    def _add(self, data: str) -> None:
        if data and not self._done and not any(hidden for _, hidden in self._open):
            self.parts.append(data)


def html_texts(raw: bytes) -> list[str]:
    """The visible text of a page without its navigation."""
    parser = _HtmlText()
    parser.feed(decoded(raw))
    parser.close()
    text = re.sub(r"\n\s*\n\s*\n", "\n\n", "".join(parser.parts))
    return [re.sub(r"(?m)(?:^[a-z-]+:\n\n){2,}", "", text)]  # the names of SQLite's syntax diagrams


def man_texts(raw: bytes) -> list[str]:
    """A manual page without its header and footer line; nothing if a part of it has other terms than the package."""
    if OTHER_TERMS.search(raw):
        return []
    page = run_tool(["mandoc", "-T", "utf8", "-O", "width=100"], raw).decode()
    lines = re.sub(".\b", "", page).strip().splitlines()  # bold and underlined characters are overstruck
    return ["\n".join(line for line in lines[1:-1] if not line.startswith("____"))]


def pod_texts(raw: bytes) -> list[str]:
    """Perl's documentation format."""
    return [run_tool(["pod2text", "--utf8", "--width=100"], raw).decode(errors="replace")]


def plain_texts(raw: bytes) -> list[str]:
    """The file as it is."""
    return [decoded(raw)]


def source_texts(raw: bytes) -> list[str]:
    """Program text that a person wrote."""
    text = decoded(raw)
    return [] if GENERATED.search(text[:1000]) else [text]


def speech_texts(raw: bytes) -> list[str]:
    """A speech with one paragraph a line: a blank line between them."""
    return [re.sub(r"\s*\n\s*", "\n\n", decoded(raw))]


def scripture_texts(raw: bytes) -> list[str]:
    """A chapter each, from one JSON object a verse."""
    chapters: dict[str, list[str]] = {}
    for line in raw.splitlines():
        verse = json.loads(line)
        title = f"{verse['book']}, chapter {verse['chapter']}"
        chapters.setdefault(title, []).append(f"{verse['verse']} {verse['text']}")
    return [f"{title}\n\n" + "\n".join(verses) for title, verses in chapters.items()]


def country_texts(raw: bytes) -> list[str]:
    """The fields of a country's JSON that are sentences rather than figures."""
    country = json.loads(raw)
    names = country.get("Government", {}).get("Country name", {})
    forms = [names.get(f"conventional {length} form", {}).get("text", "none") for length in ("short", "long")]
    name = next((form for form in forms if form != "none"), None)
    if name is None:
        return []
    sections = []
    for section, fields in country.items():
        entries = [f"{label}: {text}" for label, text in _sentences(fields)]
        if entries:
            sections.append("\n\n".join([f"{html_texts(name.encode())[0]} - {section}", *entries]))
    return ["\n\n\n".join(sections)]


def _sentences(fields: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    for key, value in fields.items():
        if isinstance(value, dict):
            yield from _sentences(value, (*path, key.strip()))
        elif "sample" not in " ".join(path):
            text = re.sub(r"^note:\s*", "", html_texts(str(value).encode())[0].strip())
            if len(text) >= 80 and sum(map(str.isdigit, text)) < len(text) / 12:
                yield " - ".join(path), text


def wordnet_texts(raw: bytes) -> list[str]:
    """One paragraph a synset: its words and its gloss."""
    entries = []
    for line in decoded(raw).splitlines():
        if line.startswith("  "):  # the licence at the top
            continue
        data, gloss = line.split(" | ", 1)
        fields = data.split(" ")
        words = [fields[4 + 2 * index] for index in range(int(fields[3], 16))]
        plain = ", ".join(re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in words)
        entries.append(f"{plain} ({WORD_CLASSES[fields[2]]}): {gloss.strip()}")
    return ["\n\n".join(entries)]


def lexicon_texts(raw: bytes) -> list[str]:
    """The Jargon File from its first chapter on, without the tables of contents between the parts."""
    text = decoded(raw)
    start = text.find("\nChapter 1.")
    paragraphs = re.split(r"\n\s*\n", text[max(start, 0) :])
    short = [len(paragraph.strip()) < 40 and "\n" not in paragraph.strip() for paragraph in paragraphs]
    kept = [
        re.sub(r"(?m)^ {3}", "", paragraph)
        for index, paragraph in enumerate(paragraphs)
        if not (short[index] and all(short[max(index - 2, 0) : index + 3])) and "_____" not in paragraph
    ]
    return ["\n\n".join(kept)]


def is_noise(paragraph: str) -> bool:
    """Whether it is a table of numbers, a dump or an encoded file rather than words."""
    dense = re.sub(r"\s", "", paragraph)
    letters = sum(map(str.isalpha, dense))
    return bool(re.search(r"[A-Za-z0-9+/=]{70,}", paragraph)) or (len(dense) >= 100 and letters < len(dense) / 2)


def clean(text: str) -> str:
    """`text` in the plain style (see the module), without people's mail addresses."""
    text = unicodedata.normalize("NFC", text).translate(SIMPLE).replace("\r\n", "\n").expandtabs(8)
    text = MAIL.sub("name@example.com", BOX.sub(" ", text))
    text = "".join(c for c in text if c == "\n" or unicodedata.category(c)[0] != "C")
    text = re.sub(r"[ \t]+\n", "\n", text + "\n")
    text = re.sub(r"\n{4,}", "\n\n\n", text).strip("\n")
    parts = re.split(r"(\n\n+)", text)
    kept = [part + gap for part, gap in zip(parts[::2], [*parts[1::2], ""], strict=True) if not is_noise(part)]
    return "".join(kept).strip("\n")
