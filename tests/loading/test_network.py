"""The network is for fetching a named model alone; where it is not needed, no connection is tried."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys

import pytest

import induction_head_detection as detection
import qk_circuit_analysis as analysis
from common import UserError
from common.loading import load
from tests.conftest import ROOT
from tests.loading.conftest import put_in_cache


@pytest.fixture
def no_sockets(monkeypatch):
    tried = []

    def refuse(*arguments, **options):
        tried.append(arguments)
        raise OSError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tried


@pytest.fixture
def online(monkeypatch):
    """As a user has it: nothing says that there is no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


@pytest.mark.parametrize("script", [detection, analysis])
@pytest.mark.parametrize("which", ["mini", "folder"])
def test_mini_and_folders_never_try_a_connection(script, which, no_sockets, online, tmp_path, random_gpt2_folder):
    model = "mini" if which == "mini" else str(random_gpt2_folder)
    arguments = ["--model", model, "--no-plots", "--text", "a b c a b c", "--out", str(tmp_path / "o")]
    assert script.main(arguments) == 0
    assert not no_sockets


def test_a_model_in_the_cache_needs_no_connection(cache, random_gpt2_folder, no_sockets, online):
    put_in_cache(cache, random_gpt2_folder, "gpt2")
    assert load("gpt2").name == "gpt2"
    assert load("auto").name == "gpt2"
    assert not no_sockets


def test_a_named_model_tries_and_says_within_seconds_that_it_cannot(cache, no_sockets, online):
    with pytest.raises(UserError, match="cannot be reached"):
        load("gpt2")
    assert no_sockets, "the hub was asked"


def test_hf_hub_offline_is_honoured(cache, no_sockets):
    with pytest.raises(UserError, match="cannot be reached"):
        load("gpt2")
    assert not no_sockets


@pytest.mark.parametrize("script", ["induction_head_detection.py", "qk_circuit_analysis.py"])
def test_a_run_says_what_it_does_and_nothing_else(script, tmp_path, random_gpt2_folder):
    """No warning of another package reaches the terminal, with all warnings on."""
    command = [sys.executable, "-W", "default", str(ROOT / script), "--model", str(random_gpt2_folder)]
    command += ["--text", "a b c a 中 $ \\ a 中 $", "--out", str(tmp_path / "o")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert lines and all(line.startswith(("loading", "model:", "layer")) for line in lines), lines


@pytest.mark.parametrize("main", [detection.main, analysis.main])
def test_quiet_says_nothing_but_the_result_and_verbose_says_more(main, tmp_path, random_gpt2_folder, capfd):
    lines = {}
    for flag in ("--quiet", "--debug", "--verbose"):
        capfd.readouterr()
        arguments = [
            "--model",
            str(random_gpt2_folder),
            "--no-plots",
            "--text",
            "a b a b",
            "--out",
            str(tmp_path / "o"),
        ]
        assert main([*arguments, flag]) == 0
        said = capfd.readouterr()
        assert "Written to" in said.out
        lines[flag] = len(said.err.splitlines())
    assert lines["--quiet"] == 0 < lines["--debug"] < lines["--verbose"]


@pytest.mark.parametrize(
    ("arguments", "suggested"),
    [
        (["--thresold", "0.4"], "did you mean --threshold?"),
        (["--model", "gpt2-smal"], "did you mean gpt2-small"),
        (["--model", "EleutherAI/pythia70m"], "EleutherAI/pythia-70m"),
        (["--model", "./nowhere"], "there is no folder ./nowhere"),
    ],
)
def test_errors_suggest_what_is_nearest(arguments, suggested, capsys, cache):
    try:
        code = detection.main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("loading")]
    assert code == 2 and len(error) == 1 and suggested in error[0]


@pytest.mark.parametrize("main", [detection.main, analysis.main])
def test_help_shows_three_examples(main, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert said.count("\n    python ") == 3 and "--quiet" in said


def test_a_layer_or_head_out_of_range_says_the_range(tmp_path, capsys, random_gpt2_folder):
    arguments = ["--model", str(random_gpt2_folder), "--no-plots", "--text", "a b a b", "--out", str(tmp_path / "o")]
    for flags, said in ((["--layer", "9"], "3 layers|0 to 2"), (["--layer", "1", "--head", "9"], "4 heads|0 to 3")):
        assert analysis.main([*arguments, *flags]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert re.search(said, error), error
