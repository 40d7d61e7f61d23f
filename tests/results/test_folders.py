"""Whatever happens to a run, the output folder holds an old result or a new one, and what else was in it."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from common import UserError
from common.results import folders
from tests.conftest import ROOT


def write(final: Path, *names: str, content: str = "new") -> None:
    with folders.output_folder(final) as folder:
        for name in names:
            (folder / name).write_text(content, encoding="utf-8")
        files = sorted([*names, "results.json"])
        (folder / "results.json").write_text(json.dumps({"files": files, "run": content}), encoding="utf-8")


def fail(final: Path, error: BaseException) -> None:
    with folders.output_folder(final) as folder:
        (folder / "a.png").write_text("half", encoding="utf-8")
        raise error


def held(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir() if path.is_file()}


@pytest.fixture(params=["trading places", "one by one"])
def way(request, monkeypatch):
    if request.param == "one by one":
        monkeypatch.setattr(folders, "exchange", lambda one, other: False)
    return request.param


def test_a_new_result_takes_the_place_of_the_old_and_other_files_stay(tmp_path, way):
    final = tmp_path / "out"
    write(final, "a.png", "b.png", content="old")
    (final / "notes.txt").write_text("mine")
    final.chmod(0o750)
    write(final, "b.png", "c.png")
    assert {name: text for name, text in held(final).items() if name != "results.json"} == {
        "b.png": "new", "c.png": "new", "notes.txt": "mine",
    }  # fmt: skip
    assert folders.earlier_results(final)["run"] == "new"
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


def test_a_failed_run_changes_nothing(tmp_path, way):
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
    for final in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nothing"), Path("a\0b")):
        with pytest.raises(UserError, match="cannot write to"), folders.output_folder(final):
            pass
    (tmp_path / "out").mkdir()

    def refuse(*arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match="Permission denied; choose another folder"), \
            folders.output_folder(tmp_path / "out"):  # fmt: skip
        pass


def test_a_folder_under_the_name_of_a_picture_is_said_and_nothing_is_lost(tmp_path):
    final = tmp_path / "out"
    write(final, "a.png", content="old")
    (final / "b.png").mkdir()
    with pytest.raises(UserError, match=r"b\.png is a folder there"):
        write(final, "b.png")
    assert folders.earlier_results(final)["run"] == "old"


def test_a_name_of_250_characters_is_written(tmp_path):
    write(tmp_path / ("n" * 250), "a.png")
    assert held(tmp_path / ("n" * 250)).keys() == {"a.png", "results.json"}


def test_what_killed_runs_left_is_cleaned_and_what_live_ones_write_is_not(tmp_path):
    (tmp_path / ".out.dead.part").mkdir()
    (tmp_path / ".out.dead.part" / "a.png").write_text("half")
    (tmp_path / ".output.dead.part").mkdir()  # another folder's
    with folders.output_folder(tmp_path / "out") as alive:
        (alive / "a.png").write_text("slow")
        write(tmp_path / "out", "a.png", content="quick")
        assert alive.exists()
        assert {path.name for path in tmp_path.iterdir()} == {"out", alive.name, ".output.dead.part"}


@pytest.mark.parametrize("stop", range(1, 7))
def test_moving_one_by_one_is_finished_by_the_next_run(tmp_path, monkeypatch, stop):
    """Stop before the `stop`-th change of a file; begin a run that fails at once: the result before it is complete."""
    final = tmp_path / "out"
    write(final, "a.png", "b.png", content="old")
    monkeypatch.setattr(folders, "exchange", lambda one, other: False)
    changes = iter(range(1, 100))

    def counted(change):
        def may_stop(*arguments, **options):
            if next(changes) == stop:
                raise KeyboardInterrupt
            return change(*arguments, **options)

        return may_stop

    with monkeypatch.context() as patched, suppress(KeyboardInterrupt):
        for owner, kind in ((Path, "replace"), (Path, "unlink"), (os, "replace")):
            patched.setattr(owner, kind, counted(getattr(owner, kind)))
        write(final, "b.png", "c.png")
    with pytest.raises(KeyboardInterrupt):
        fail(final, KeyboardInterrupt())
    assert folders.earlier_results(final)["run"] == "new"
    assert held(final).keys() == {"b.png", "c.png", "results.json"}
    assert held(final)["b.png"] == "new"


WRITES_FOREVER = """
import json, sys
from pathlib import Path
from common.results import folders
run = int(sys.argv[2])
print("ready", flush=True)
while True:
    run += 1
    names = [f"{number:02d}.png" for number in range(run % 7, 30)]
    with folders.output_folder(Path(sys.argv[1])) as folder:
        for name in names:
            (folder / name).write_text(str(run))
        (folder / "results.json").write_text(json.dumps({"files": [*names, "results.json"], "run": str(run)}))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_at_any_moment_the_folder_holds_one_whole_result(tmp_path):
    """A process writes run after run of different files and is killed, 25 times; each file tells its run."""
    final, chance, seen = tmp_path / "out", random.Random(0), set()
    write(final, "00.png", content="0")
    (final / "notes.txt").write_text("mine")
    for attempt in range(25):
        command = [sys.executable, "-c", WRITES_FOREVER, str(final), str(1000 * attempt)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(chance.uniform(0, 0.03))
        process.kill()
        process.wait()
        process.stdout.close()
        results = folders.earlier_results(final)
        files = held(final)
        assert files.keys() == {*results["files"], "notes.txt"}
        assert {text for name, text in files.items() if name.endswith(".png")} == {results["run"]}
        seen.add(results["run"])
    assert len(seen) > 10
    write(final, "00.png", content="last")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


IS_KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
import induction_head_detection as script
from common.results import folders
model, final = sys.argv[1], Path(sys.argv[2])

def run(seed, *texts):
    texts = [part for text in texts for part in ("--text", text)]
    return script.main(["--model", model, "--out", str(final), "--no-plots", "--seed", str(seed), *texts])

torch.set_num_threads(1)
assert run(0, "a b a b") == 0
chance, seen = random.Random(1), set()
for attempt in range(20):
    child = os.fork()
    if not child:
        for seed in range(1000 * attempt, 1000 * attempt + 1000):
            run(seed, "a b a b", "the cat sat the cat sat")
    time.sleep(chance.uniform(0.0, 0.8))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    results = json.loads((final / "results.json").read_text())
    assert sorted(path.name for path in final.iterdir()) == results["files"] == ["heads.csv", "results.json"]
    table = (final / "heads.csv").read_text().splitlines()
    assert len(table) == 1 + len(results["heads"])
    low = [head["prefix_matching_interval"][0] for head in results["heads"]]
    assert [float(row.split(",")[5]) for row in table[1:]] == low
    seen.add(results["seed"])
assert run(0, "a b a b") == 0
assert os.listdir(final.parent) == [final.name], os.listdir(final.parent)
assert len(seen) > 5, seen
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_script_killed_at_any_moment_leaves_one_whole_result(tmp_path, random_gpt2_folder):
    (tmp_path / "place").mkdir()
    command = [sys.executable, "-c", IS_KILLED, str(random_gpt2_folder), str(tmp_path / "place" / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
