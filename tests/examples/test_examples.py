"""The pages of examples/: every command runs and says what its page shows, the list goes on, pictures are small."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shlex
import shutil
import sys

import pytest

from examples import make_pages
from tests.conftest import ROOT

EXAMPLES = ROOT / "examples"
NEEDS = {"own_labels.md": "own_sentence.md"}
NUMBER = re.compile(r"[-+]?\d+(\.\d+)?")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder in which the commands run: what they need of the project, and nothing that they could change in it."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(EXAMPLES, folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("models", "induction_head_detection.py"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def run(command: str) -> str:
    """Run a command of a page, `python FILE` or `python -m MODULE`, in this process; what it prints on stdout."""
    program, *arguments = shlex.split(command)
    if program == "cp":
        shutil.copy(*arguments)
        return ""
    assert program == "python"
    output, code = io.StringIO(), None
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        as_module = arguments[0] == "-m"
        patch.setattr(sys, "argv", arguments[as_module:])
        start = runpy.run_module if as_module else runpy.run_path
        try:
            start(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            code = end.code
    assert not code, f"{command} ended with {code}"
    return output.getvalue()


def page(name: str) -> str:
    return (EXAMPLES / name).read_text(encoding="utf-8")


def said(page: str) -> list[str]:
    """What a page says that does not hang on the last digit: the heads, and the texts, their numbers left out."""
    lines = "".join(make_pages.BLOCK.findall(page)).splitlines()
    exact = [line for line in lines if line.startswith("Induction heads:") or "with all heads:" in line]
    return exact + [NUMBER.sub("#", line) for line in lines if line.startswith(("Text", "No head"))]


@pytest.mark.parametrize("name", make_pages.PAGES)
def test_every_command_of_a_page_runs_and_says_what_the_page_shows(name, project, monkeypatch):
    monkeypatch.chdir(project)
    if name in NEEDS and not (project / "outputs").exists():
        make_pages.remade(page(NEEDS[name]), run)
    for picture in (project / "examples" / "pictures").glob("*.png"):
        picture.unlink()
    now = make_pages.remade(page(name), run)
    assert said(now) == said(page(name)), "the pages are older than the model: python -m examples.make_pages"
    for picture in re.findall(r"\((pictures/[^)]+)\)", page(name)):
        assert (project / "examples" / picture).read_bytes().startswith(b"\x89PNG")


def test_the_list_goes_on_with_the_induction_heads_and_not_without():
    shown = page("continue_a_list.md")
    whole, without, control = (written for _, written in re.findall(r"^  (with[^:]*): +(.*)$", shown, re.MULTILINE))
    assert whole.startswith("·blue·gold") and control.startswith("·blue·gold")
    assert not without.startswith("·blue")


def test_the_readme_lists_every_page_and_pages_show_small_pictures_that_exist():
    assert {path.name for path in EXAMPLES.glob("*.md")} == {"README.md", *make_pages.PAGES}
    pictures = set()
    for name in make_pages.PAGES:
        shown = re.findall(r"\((pictures/[^)]+)\)", page(name))
        assert shown, name
        pictures |= set(shown)
    assert {f"pictures/{path.name}" for path in (EXAMPLES / "pictures").iterdir()} == pictures
    assert max((EXAMPLES / picture).stat().st_size for picture in pictures) < 150_000


def test_a_page_is_remade_from_its_commands_alone():
    shown = "a\n```console\n$ python x.py\nold\nold\n$ cp a b\n```\nb\n```console\n$ python y.py\n```\n"
    first, second = "$ python x.py\nran python x.py\n$ cp a b\n", "$ python y.py\nran python y.py\n"
    now = make_pages.remade(shown, lambda command: "" if command.startswith("cp") else f"ran {command}\n")
    assert now == f"a\n```console\n{first}```\nb\n```console\n{second}```\n"
    assert make_pages.commands(shown) == ["python x.py", "cp a b", "python y.py"]
