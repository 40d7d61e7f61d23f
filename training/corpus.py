"""Public-domain English for the bundled model, fetched as Debian packages and never installed.

1. `apt-get download` four packages into a folder and unpack them there (no root needed, nothing is installed).
2. Read the texts: the King James Bible, six novels by Jane Austen, the Jargon File.
3. Clean them, and hold back the last `HELD_OUT` share of each source for evaluation.

All three texts are in the public domain, as the `copyright` file of each package says.
"""

from __future__ import annotations

import gzip
import re
import subprocess
import warnings
import zlib
from pathlib import Path

PACKAGES = ("bible-kjv", "bible-kjv-text", "r-cran-janeaustenr", "jargon-text")
HELD_OUT = 0.03


def fetch(folder: Path) -> None:
    """Download and unpack the packages into `folder`; what is already there is kept.

    Raises RuntimeError where `apt-get` or `dpkg` is missing or fails, with what it said.
    """
    if (folder / "unpacked").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    _run(["apt-get", "download", "-q", *PACKAGES], folder)
    partial = folder / "unpacking"
    for package in sorted(folder.glob("*.deb")):
        _run(["dpkg", "-x", str(package.resolve()), str(partial.resolve())], folder)
    partial.rename(folder / "unpacked")


def load(folder: Path) -> tuple[list[str], list[str]]:
    """Training texts and held-out texts, one string per source, in a fixed order."""
    root = folder / "unpacked"
    sources = [_bible(root), *_austen(root), _jargon(root)]
    cuts = [int(len(text) * (1 - HELD_OUT)) for text in sources]
    train = [text[:cut] for text, cut in zip(sources, cuts, strict=True)]
    held_out = [text[cut:] for text, cut in zip(sources, cuts, strict=True)]
    return train, held_out


def _run(command: list[str], folder: Path) -> bytes:
    try:
        return subprocess.run(command, cwd=folder, check=True, capture_output=True).stdout
    except FileNotFoundError as error:
        raise RuntimeError(f"{command[0]} is not on this machine: the texts come as Debian packages") from error
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{' '.join(command[:2])} failed: {error.stderr.decode(errors='replace')[-300:]}") from error


def _bible(root: Path) -> str:
    """Verses without their numbers, one paragraph per chapter."""
    program, data = (root / "usr/bin/bible").resolve(), (root / "usr/lib").resolve()
    lines = _run([str(program), "-p", str(data), "-f", "gen1:1-rev22:21"], root).decode("latin-1").splitlines()
    chapters: dict[str, list[str]] = {}
    for line in lines:
        reference, _, verse = line.partition(" ")
        chapters.setdefault(reference.partition(":")[0], []).append(verse.strip())
    return "\n\n".join(" ".join(verses) for verses in chapters.values())


def _austen(root: Path) -> list[str]:
    """The novels, from the compressed objects of an R package (length prefix, then zlib, then R's own format)."""
    import rdata

    folder = root / "usr/lib/R/site-library/janeaustenr/data"
    packed = (folder / "Rdata.rdb").read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it had to guess the file type, and guesses right
        index = rdata.conversion.convert(
            rdata.parser.parse_data(zlib.decompress((folder / "Rdata.rdx").read_bytes(), wbits=47))
        )
        places = {str(name): place for name, place in index["variables"].items()}
        books = []
        for name in sorted(places):
            start, length = (int(number) for number in places[name])
            book = rdata.parser.parse_data(zlib.decompress(packed[start + 4 : start + length]))
            books.append("\n".join(str(line) for line in rdata.conversion.convert(book)))
    return [_unwrap(book) for book in books]


def _jargon(root: Path) -> str:
    """The Jargon File without its tables and rulers."""
    text = gzip.decompress((root / "usr/share/doc/jargon-text/jargon.txt.gz").read_bytes()).decode("utf-8")
    lines = [line for line in text.splitlines() if not re.search("[\u2500-\u257f]|^ *[-=_*]{4}", line)]
    return _unwrap("\n".join(lines))


def _unwrap(text: str) -> str:
    """Join the lines of each paragraph: hard line ends are an accident of the files, not of the language."""
    paragraphs = re.split(r"\n\s*\n", text)
    return "\n\n".join(joined for paragraph in paragraphs if (joined := " ".join(paragraph.split())))
