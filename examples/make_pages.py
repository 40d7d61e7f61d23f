"""Make the pages of this folder anew: run every command that they name and put in what it prints.

    python -m examples.make_pages                  # all pages
    python -m examples.make_pages continue_a_list.md

A page holds blocks that begin with ```console. In a block, a line `$ python …` is a command, run from the project's
folder, and the lines after it are what it printed; `$ cp FILE PICTURE` brings a picture in. Pictures are made smaller.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image

HERE = Path(__file__).resolve().parent
BLOCK = re.compile(r"(?<=```console\n).*?(?=```)", re.DOTALL)
PAGES = re.findall(r"\]\((\w+\.md)\)", (HERE / "README.md").read_text(encoding="utf-8"))  # some need those before
WIDEST = 1400  # pixels of a picture
COLOURS = 128


def main(pages: list[str]) -> None:
    for page in pages or PAGES:
        path = HERE / page
        path.write_text(remade(path.read_text(encoding="utf-8"), printed), encoding="utf-8")
        print(path.name)
    for picture in (HERE / "pictures").glob("*.png"):
        shrink(picture)


def commands(page: str) -> list[str]:
    """The commands of a page, in order."""
    return [line[2:] for block in BLOCK.findall(page) for line in block.splitlines() if line.startswith("$ ")]


def remade(page: str, run: Callable[[str], str]) -> str:
    """The page with what each command prints now in place of what it printed."""

    def again(block: re.Match[str]) -> str:
        return "".join(f"$ {command}\n{run(command)}" for command in commands(f"```console\n{block[0]}```"))

    return BLOCK.sub(again, page)


def printed(command: str) -> str:
    """What a command prints on stdout."""
    program, *arguments = shlex.split(command)
    if program == "cp":
        shutil.copy(*arguments)
        return ""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=HERE.parent, env={**os.environ, "COLUMNS": "100"}, check=True,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return "\n".join(line.rstrip() for line in done.stdout.strip("\n").splitlines()) + "\n"


def shrink(picture: Path) -> None:
    """Make a picture small enough for a page: fewer pixels and colours."""
    with Image.open(picture) as image:
        if image.mode == "P":
            return
        small = image.convert("RGB")
    small.thumbnail((WIDEST, WIDEST), Image.Resampling.LANCZOS)
    small.quantize(COLOURS, dither=Image.Dither.NONE).save(picture, optimize=True)


if __name__ == "__main__":
    os.chdir(HERE.parent)
    main(sys.argv[1:])
