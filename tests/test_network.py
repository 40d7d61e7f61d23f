"""The network is for fetching a named model alone; where it is not needed, no connection is tried."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

import induction_head_detection as detection
import qk_circuit_analysis as analysis
from common import models
from tests.conftest import ROOT
from tests.test_models import cache, put_in_cache  # noqa: F401  (a fixture)


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


def test_a_model_in_the_cache_needs_no_connection(cache, random_gpt2_folder, no_sockets, online):  # noqa: F811
    put_in_cache(cache, random_gpt2_folder, "gpt2")
    assert models.load("gpt2").name == "gpt2"
    assert models.load("auto").name == "gpt2"
    assert not no_sockets


def test_a_named_model_tries_and_says_within_seconds_that_it_cannot(cache, no_sockets, online):  # noqa: F811
    with pytest.raises(models.UserError, match="cannot be reached"):
        models.load("gpt2")
    assert no_sockets, "the hub was asked"


def test_hf_hub_offline_is_honoured(cache, no_sockets):  # noqa: F811
    with pytest.raises(models.UserError, match="cannot be reached"):
        models.load("gpt2")
    assert not no_sockets


@pytest.mark.parametrize("script", ["induction_head_detection.py", "qk_circuit_analysis.py"])
def test_a_run_says_what_it_does_and_nothing_else(script, tmp_path):
    """No warning of another package reaches the terminal, with all warnings on; the table comes with --quiet too."""
    command = [
        sys.executable,
        "-W",
        "default",
        str(ROOT / script),
        "--model",
        "mini",
        "--text",
        "a b c a 中 $ \\ a 中 $",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    said = {}
    for flags in ((), ("--quiet",)):
        done = subprocess.run(
            [*command, "--out", str(tmp_path / "o"), *flags], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        said[flags] = done
    lines = said[()].stderr.splitlines()
    assert lines and all(line.startswith(("loading", "model:", "layer")) for line in lines)
    assert said["--quiet",].stderr == ""
    assert said["--quiet",].stdout.replace("\n", "") and "Written to" in said["--quiet",].stdout
