"""Whatever happens to a run, the output folder holds an old result or a new one, and what else was in it."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common import UserError
from common.results import files
from tests.conftest import ROOT


def write(final: Path, *names: str, content: str = "new") -> None:
    with files.output_folder(final) as folder:
        for name in names:
            (folder / name).write_text(content, encoding="utf-8")
        files.write_results(folder, lambda written: {"files": written, "run": content})


def fail(final: Path, error: BaseException) -> None:
    with files.output_folder(final) as folder:
        (folder / "a.png").write_text("half", encoding="utf-8")
        raise error


def held(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir() if path.is_file()}


def test_a_new_result_takes_the_place_of_the_old_and_other_files_stay(tmp_path):
    final = tmp_path / "out"
    write(final, "a.png", "b.png", content="old")
    (final / "notes.txt").write_text("mine")
    final.chmod(0o750)
    write(final, "b.png", "c.png")
    assert {name: text for name, text in held(final).items() if name != "results.json"} == {
        "b.png": "new", "c.png": "new", "notes.txt": "mine",
    }  # fmt: skip
    assert files.prepare(final)["run"] == "new"
    assert final.stat().st_mode & 0o777 == 0o750
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_subfolders_links_and_a_folder_somebody_works_in_stay(tmp_path, monkeypatch):
    final = tmp_path / "out"
    write(final, "a.png", content="old")
    (final / "deep").mkdir()
    (final / "deep" / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to(final)
    monkeypatch.chdir(final)
    here = os.stat(".").st_ino
    write(Path("."), "a.png")
    write(tmp_path / "link", "c.png")
    assert held(final).keys() == {"c.png", "results.json"}
    assert (final / "deep" / "notes.txt").read_text() == "mine"
    assert os.stat(".").st_ino == here == final.stat().st_ino
    assert (tmp_path / "link").is_symlink()


def test_a_failed_run_changes_nothing(tmp_path):
    write(tmp_path / "out", "a.png", content="old")
    before = held(tmp_path / "out")
    for error in (KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")):
        with pytest.raises((KeyboardInterrupt, UserError)):
            fail(tmp_path / "out", error)
    assert held(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_one_line(tmp_path):
    with pytest.raises(UserError, match="writing to .* failed: No space left on device"):
        fail(tmp_path / "out", OSError(errno.ENOSPC, "No space left on device"))
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_way_and_a_folder_that_cannot_be_written_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(files, "LOCK_PATIENCE", 0.0)
    for final in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nothing"), Path("a\0b")):
        with pytest.raises(UserError, match="cannot write to .*; choose another folder with --out"):
            files.prepare(final)
    (tmp_path / "out").mkdir()

    def refuse(*arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match="Permission denied; choose another folder"):
        files.prepare(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


def test_preparing_leaves_nothing_and_reads_what_is_there(tmp_path):
    assert files.prepare(tmp_path / "deep" / "out") is None
    assert not (tmp_path / "deep" / "out").exists()
    for text in ("", "{", "null", "[" * 100_000):  # malformed, which is not the same as missing
        (tmp_path / "results.json").write_text(text)
        assert files.prepare(tmp_path) == text
    (tmp_path / "results.json").write_text("[1]")
    assert files.prepare(tmp_path) == [1]


def test_where_the_parent_is_not_ours_the_hidden_folder_is_inside(tmp_path, monkeypatch):
    write(tmp_path / "out", "a.png", content="old")
    monkeypatch.setattr(files.os, "access", lambda *arguments: False)
    with files.output_folder(tmp_path / "out") as folder:
        assert folder.parent == tmp_path / "out"
        files.write_results(folder, lambda written: {"files": written})
    assert held(tmp_path / "out").keys() == {"results.json"}


def test_a_folder_under_the_name_of_a_picture_is_said_and_nothing_is_lost(tmp_path):
    final = tmp_path / "out"
    write(final, "a.png", content="old")
    (final / "b.png").mkdir()
    with pytest.raises(UserError, match=r"b\.png is a folder there"):
        write(final, "b.png")
    assert files.prepare(final)["run"] == "old" and held(final).keys() == {"a.png", "results.json"}


def test_a_name_of_250_characters_is_written(tmp_path):
    write(tmp_path / ("n" * 250), "a.png")
    assert held(tmp_path / ("n" * 250)).keys() == {"a.png", "results.json"}


def test_a_result_that_lists_files_elsewhere_deletes_none_of_them(tmp_path):
    (tmp_path / "precious").write_text("mine")
    final = tmp_path / "out"
    final.mkdir()
    (final / "results.json").write_text(json.dumps({"files": ["../precious", str(tmp_path / "precious"), "..", 3]}))
    write(final, "a.png")
    assert (tmp_path / "precious").read_text() == "mine"


def test_two_runs_do_not_write_at_the_same_time_and_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LOCK_PATIENCE", 0.0)
    final = tmp_path / "out"
    with files.output_folder(final) as alive:
        (alive / "a.png").write_text("slow")
        code = f"from common.results import files\nfiles.LOCK_PATIENCE = 0.0\nfiles.prepare(files.Path({str(final)!r}))"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert "another run is writing to" in done.stderr
        files.write_results(alive, lambda written: {"files": written})
    assert held(final).keys() == {"a.png", "results.json"}


def test_what_killed_runs_left_is_removed_and_what_is_not_theirs_stays(tmp_path):
    for name in (".out.part", ".output.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_text("half")
    (tmp_path / ".out.lock").write_text("")
    files.prepare(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [".output.part"]


IS_KILLED = """
import json, os, sys
from pathlib import Path
from common.results import files

final, killed_at, counting = Path(sys.argv[1]), None, False

def write(run, names):
    with files.output_folder(final) as folder:
        for name in names:
            (folder / name).write_text(run)
        files.write_results(folder, lambda written: {"files": written, "run": run})

def count(event, arguments):
    # Before each change of a file or folder; `open` with flags that create or write is one.
    global killed_at
    changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod")
    if counting and (changes or event == "open" and isinstance(arguments[2], int) and arguments[2] & 3):
        killed_at -= 1
        if killed_at < 0:
            os._exit(9)

sys.addaudithook(count)
operation, survived = 0, False
while not survived:
    child = os.fork()
    if not child:
        killed_at, counting = operation, True
        write("new", ["b.png", "c.png", "d.png"])
        os._exit(0)
    survived = os.waitpid(child, 0)[1] == 0
    def held():
        if not final.exists():
            return {}
        return {path.name: path.read_text() for path in final.iterdir()
                if path.is_file() and path.name != "results.json"}
    def of(run, *names):
        return {**dict.fromkeys(names, run), **own}
    own = {"notes.txt": "mine"} if sys.argv[2] == "old" else {}
    whole = {"old": of("old", "a.png", "b.png"), "new": of("new", "b.png", "c.png", "d.png")}
    if (final / "results.json").exists():
        assert held() == whole[json.loads((final / "results.json").read_text())["run"]], (operation, held())
    found = (files.prepare(final) or {}).get("run")
    assert held() == whole.get(found, {}) and (found or sys.argv[2] == "nothing"), (operation, found, held())
    beside = os.listdir(final.parent)
    assert beside in ([final.name], []), (operation, beside)
    assert not final.exists() or all(path.is_file() for path in final.iterdir()), operation
    print(operation, found)
    operation += 1
    if sys.argv[2] == "old":
        write("old", ["a.png", "b.png"])
    elif found:
        assert survived or found == "new"
        for path in final.iterdir():
            path.unlink()
        final.rmdir()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("before", ["old", "nothing"])
def test_killed_before_any_change_of_a_file_the_folder_holds_one_whole_result_or_none(tmp_path, before):
    """A child is killed before its first, second, … change of a file; the next run finds the old result or finishes the
    new one, never a mixture."""
    final = tmp_path / "place" / "out"
    final.parent.mkdir()
    if before == "old":
        write(final, "a.png", "b.png", content="old")
        (final / "notes.txt").write_text("mine")
    command = [sys.executable, "-c", IS_KILLED, str(final), before]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = [line.split()[1] for line in done.stdout.splitlines()]
    assert outcomes == sorted(outcomes, key=["None", "old", "new"].index), "once the new result counts, it stays"
    assert len(outcomes) > 8 and outcomes.count("new") > (6 if before == "old" else 0)


def test_json_holds_plain_values_alone():
    content = {"a": np.float32(1 / 3), 2: [np.int64(3), math.nan, math.inf], "c": (np.True_, None), "d": np.eye(2)}
    assert files.jsonable(content) == {"a": 0.333333, "2": [3, None, None], "c": [True, None], "d": [[1, 0], [0, 1]]}
