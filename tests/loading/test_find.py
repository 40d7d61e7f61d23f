"""Where a model is found: bundled, in a folder, in the cache; and what is said where it is nowhere."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path

import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from common import UserError
from common.loading import find, load
from tests.loading.conftest import put_in_cache


def found(name: object) -> tuple[Path, str, str]:
    return find.find_folder(str(name), lambda message: pytest.fail(message))


def test_mini_is_bundled():
    assert found("mini") == (find.MINI, "mini", "bundled with this project")
    assert find.has_weights(find.MINI)


def test_a_folder_is_called_as_it_is_named(random_gpt2_folder, tmp_path):
    assert found(random_gpt2_folder)[:2] == (random_gpt2_folder, "random-gpt2")
    (tmp_path / "a\x1b[2Jb").mkdir()
    folder, shown, source = found(tmp_path / "a\x1b[2Jb")
    assert folder == tmp_path / "a\x1b[2Jb"
    assert shown.isprintable() and source.isprintable() and "\\" not in shown


def test_gpt2_without_network_and_cache_says_what_to_do(cache):
    started = time.monotonic()
    with pytest.raises(UserError, match="--model mini.*HF_HOME"):
        load("gpt2")
    assert time.monotonic() - started < 5 + find.PATIENCE


def test_auto_without_network_and_cache_is_mini_and_says_so(cache):
    model = load("auto")
    assert model.name == "mini"
    reason = "not in the local Hugging Face cache, and the hub cannot be reached (HF_HUB_OFFLINE is set)"
    assert "--model auto could not have GPT-2 small" in model.source and reason in model.source


def test_auto_with_gpt2_in_the_cache_is_gpt2(cache, random_gpt2_folder):
    put_in_cache(cache, random_gpt2_folder, "gpt2")
    model = load("auto")
    assert model.name == "gpt2"
    assert "cache" in model.source and "--model auto" in model.source


def refuse_with(error: Exception):
    def refuse(*arguments: object, **options: object) -> None:
        raise error

    return refuse


def broken_cache(cache: Path, folder: Path) -> None:
    (put_in_cache(cache, folder, "gpt2") / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("answer", "download", "said"),
    [
        (OSError("Network is unreachable\nand more"), None, "hub cannot be reached (Network is unreachable)"),
        (None, OSError(errno.ENOSPC, "x"), "downloading it failed (no space left on the disk of the cache"),
        (None, RuntimeError("429 \x1b[2J slow down\nagain"), "downloading it failed (429 \\x1b[2J slow down)"),
        (GatedRepoError.__new__(GatedRepoError, "no"), None, "the hub asks for a login"),
        (RepositoryNotFoundError.__new__(RepositoryNotFoundError, "no"), None, "nor is it on the hub"),
    ],
)
@pytest.mark.parametrize("cached", ["nothing", "broken"])
def test_auto_says_why_it_fell_back(cache, random_gpt2_folder, monkeypatch, answer, download, said, cached):
    import huggingface_hub

    local, ask = huggingface_hub.snapshot_download, refuse_with(answer) if answer else lambda *_, **options: object()
    if cached == "broken":
        broken_cache(cache, random_gpt2_folder)

    def snapshot(*arguments: object, local_files_only: bool = False, **options: object) -> str:
        if local_files_only:
            return local(*arguments, local_files_only=True, **options)
        raise download

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", ask)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    folder, name, source = found("auto")
    assert (folder, name) == (find.MINI, "mini") and said in source and source.isprintable()
    assert ("no safetensors weights" in source) == (cached == "broken") != ("not in the local" in source)


def test_an_old_alias_finds_the_same_cache(cache, random_gpt2_folder):
    put_in_cache(cache, random_gpt2_folder, "gpt2")
    assert load("gpt2-small").n_layers == 3


def test_gpt2_in_the_cache_as_a_pickle_only_is_not_taken_for_there(cache, random_gpt2_folder):
    put_in_cache(cache, random_gpt2_folder, "gpt2")
    weights = next(cache.rglob("model.safetensors"))
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(UserError, match="--model mini"):
        load("gpt2")


def test_weights_in_parts_are_there_where_every_part_is(tmp_path):
    (tmp_path / "one.safetensors").touch()
    assert find.has_weights(tmp_path)
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert not find.has_weights(tmp_path)
    (tmp_path / "two.safetensors").touch()
    assert find.has_weights(tmp_path)


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "../nowhere", "~/nowhere"])
def test_a_path_to_nothing_is_no_name_of_a_model(name, no_hub):
    with pytest.raises(UserError, match="there is no folder"):
        found(name)
    assert not no_hub


@pytest.mark.parametrize(
    ("name", "suggested"),
    [
        ("gpt2-smal", "did you mean gpt2-small"),
        ("GPT2", "did you mean gpt2"),
        ("EleutherAI/pythia70m", "EleutherAI/pythia-70m"),
        ("minni", "mini"),
    ],
)
def test_the_nearest_names_are_suggested(cache, name, suggested):
    with pytest.raises(UserError) as error:
        found(name)
    assert suggested in str(error.value) and len(str(error.value).splitlines()) == 1


def test_a_name_like_none_gets_no_suggestion(cache):
    with pytest.raises(UserError) as error:
        found("zzzzqqqq")
    assert "did you mean" not in str(error.value)
    assert find._nearest("gpt2") == "", "a known name is no slip"


def test_a_name_that_no_repository_can_have_is_said(cache):
    with pytest.raises(UserError, match="neither a folder nor a model name"):
        found("a b/c d/e")


@pytest.fixture
def no_hub(monkeypatch) -> list[str]:
    asked: list[str] = []
    monkeypatch.setattr(find, "_ask_hub", lambda repository, name, cached: asked.append(name))
    return asked


def test_a_hub_that_does_not_answer_is_given_up_after_the_patience(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(find, "PATIENCE", 0.2)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, timeout: time.sleep(30))
    started = time.monotonic()
    with pytest.raises(UserError, match="cannot be reached"):
        find._ask_hub("gpt2", "gpt2", "not cached")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("kind", "said"), [("GatedRepoError", "hf auth login"), ("RepositoryNotFoundError", "hub has")]
)
def test_what_the_hub_answers_is_told_apart(monkeypatch, kind, said):
    import huggingface_hub
    from huggingface_hub import errors

    def refuse(self: object, name: str, timeout: float) -> None:
        error = getattr(errors, kind)
        raise error.__new__(error, "no")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    with pytest.raises(UserError, match=said):
        find._ask_hub("some/model", "some/model", "not cached")
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, timeout: object())
    assert find._ask_hub("some/model", "some/model", "not cached") is None


def test_the_home_folder_is_not_guessed(cache, monkeypatch, tmp_path):
    """A folder wins over a model of the same name."""
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert found("gpt2")[0] == Path("gpt2") and os.path.isdir("gpt2")
