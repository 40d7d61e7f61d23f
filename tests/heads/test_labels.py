"""Labels: files a user may get wrong, the published table, and which of them is chosen."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from common import UserError
from common.attention.head import Head
from common.heads import labels
from common.heads.labels import Labels
from common.loading import load
from tests.conftest import save_random_gpt2


def test_labels_are_read(tmp_path):
    path = tmp_path / "labels.json"
    path.write_text(json.dumps({"source": "by hand", "induction_heads": ["1.2", "0.0"]}))
    assert labels.read_labels(path, 2, 3) == Labels(frozenset({Head.at(1, 2), Head.at(0, 0)}), "by hand")


def test_a_file_says_its_kind_or_it_is_called_unknown(tmp_path):
    path, heads = tmp_path / "labels.json", {"induction_heads": ["0.0"], "uncertain_heads": ["1.1", "0.0"]}
    path.write_text(json.dumps(heads))
    said = labels.read_labels(path, 2, 3)
    assert said.kind == "unknown" and said.complete and said.source == str(path)
    assert "own labels, kind not said" in labels.KINDS[said.kind][0]
    assert said.uncertain == {Head.at(1, 1)}, "a head in both lists is labelled"
    path.write_text(json.dumps({**heads, "kind": "ablation", "measured": "loss", "complete": False}))
    said = labels.read_labels(path, 2, 3)
    assert (said.kind, said.measured, said.complete) == ("ablation", "loss", False) and "measured: loss" in said.about()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "induction_heads"),
        ('{"induction_heads": "5.1"}', "induction_heads"),
        ('{"induction_heads": [5.1]}', "no head"),
        ('{"induction_heads": [["5.1"]]}', "no head"),
        ('{"induction_heads": ["a.b"]}', "no head"),
        ('{"induction_heads": ["²."]}', "no head"),
        ('{"induction_heads": ["1.٢"]}', "no head"),
        ('{"induction_heads": ["2.0"]}', "no head 2.0"),
        ('{"induction_heads": ["cross 1.0"]}', "no head cross 1.0"),
        ('{"induction_heads": ["0.3"]}', "no head 0.3.*another model's labels"),
        ('{"induction_heads": [], "kind": "vibes"}', "'vibes' is no kind of labels; write one of construction, causal"),
        ('{"induction_heads": [], "kind": ["causal"]}', "no kind of labels"),
        ('{"induction_heads": [], "uncertain_heads": "0.1"}', "uncertain_heads"),
        ('{"induction_heads": ["0.1"], "complete": "false"}', "write true or false, without quotes"),
        ('{"induction_heads": [], "complete": false}', "they say nothing"),
        (
            '{"induction_heads": ["0.1"], "uncertain_heads": ["0.0", "0.2", "1.0", "1.1", "1.2"]}',
            "nothing can be wrong",
        ),
    ],
)
def test_wrong_label_files_say_what_is_wrong(tmp_path, text, reason):
    path = tmp_path / "labels.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=reason):
        labels.read_labels(path, 2, 3)


def test_a_missing_label_file_is_said(tmp_path):
    with pytest.raises(UserError, match="cannot read labels.*published, causal or none"):
        labels.read_labels(tmp_path / "none.json", 2, 3)


def never() -> Labels:
    raise AssertionError("nothing asked for causal labels")


@pytest.fixture
def published(tmp_path, monkeypatch, random_gpt2):
    """A function that publishes a set for the weights of the random GPT-2, in a folder of its own."""
    monkeypatch.setattr(labels, "PUBLISHED", tmp_path / "published")
    (tmp_path / "published").mkdir()

    def publish(name: str, kind: str, **more: object) -> None:
        of = {"name": "the random one", "layers": 3, "heads": 4, "weights_sha256": list(random_gpt2.weights)}
        content = {"kind": kind, "source": name, "induction_heads": ["1.0"], "model": of, **more}
        (tmp_path / "published" / f"{name}.json").write_text(json.dumps(content))

    return publish


def test_a_published_set_is_for_its_weights_whatever_they_are_called(published, random_gpt2_folder, tmp_path):
    published("tiny", "attention")
    elsewhere = shutil.copytree(random_gpt2_folder, tmp_path / "another name")
    found = labels.choose_labels(None, load(str(elsewhere)), never)
    assert found.source == "tiny" and found == labels.choose_labels("published", load(str(elsewhere)), never)


@pytest.mark.parametrize("how", ["fine-tuned", "random"])
def test_a_fine_tuned_or_random_model_of_that_name_and_shape_has_no_such_labels(
    how, published, random_gpt2, random_gpt2_folder, tmp_path, tokenizer
):
    published("random-gpt2", "attention")
    folder = tmp_path / random_gpt2.name
    if how == "random":
        save_random_gpt2(folder, tokenizer, seed=1)
    else:
        shutil.copytree(random_gpt2_folder, folder)
        weights = load_file(folder / "model.safetensors")
        weights["transformer.h.2.attn.c_attn.bias"][0] += 1e-5  # one step of training
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    pretender, said = load(str(folder)), []
    assert pretender.name == random_gpt2.name
    assert labels.choose_labels(None, pretender, never) is None
    with pytest.raises(UserError, match="no labels were published for the weights.*random-gpt2.*--labels causal"):
        labels.choose_labels("published", pretender, never)
    assert labels.choose_labels("random-gpt2", pretender, never, said.append).source == "random-gpt2"
    assert said == ["labels random-gpt2 were published for the random one; whether these are its weights is not known"]


def test_the_same_weights_with_other_heads_are_another_model(published, random_gpt2):
    published("tiny", "attention")
    wide = SimpleNamespace(name="x", weights=random_gpt2.weights, n_layers=3, n_heads=8, labels_file=None)
    assert labels.choose_labels(None, wide, never) is None


def test_of_several_sets_the_whole_and_best_supported_is_taken_and_the_others_named(published, random_gpt2):
    said: list[str] = []
    published("a-look", "attention")
    published("b-task", "path patching", complete=False)
    published("c-loss", "ablation")
    assert labels.choose_labels("published", random_gpt2, never, said.append).source == "c-loss"
    assert len(said) == 1 and "--labels a-look, --labels b-task" in said[0]


EXPECTED = {  # arXiv 2211.00593, 2605.24059, and the ARENA course, as the project's facts have them
    "gpt2": ("attention", True, "5.1 5.5 6.9 7.2 7.10", ""),
    "gpt2-ioi": ("path patching", False, "5.5 6.9", "5.8 5.9"),
    "pythia-160m": ("ablation", True, "4.6 4.8 4.11 5.0 5.7 8.2 8.11", ""),
    "pythia-1b": ("ablation", True, "4.4 7.0 7.1", "5.6 5.7 10.5"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_published_sets_say_kind_source_and_what_was_measured(name):
    path = labels.PUBLISHED / f"{name}.json"
    model = json.loads(path.read_text())["model"]
    kind, complete, heads, uncertain = EXPECTED[name]
    found = labels.read_labels(path, model["layers"], model["heads"])
    assert (found.kind, found.complete) == (kind, complete) and found.measured and "published" in found.source
    assert found.heads == set(map(Head.parse, heads.split())) and found.uncertain == set(
        map(Head.parse, uncertain.split())
    )
    assert {path.stem for path in labels.PUBLISHED.glob("*.json")} == set(EXPECTED)


def test_a_set_whose_weights_are_not_known_is_applied_by_name_alone():
    hashes = {name: json.loads((labels.PUBLISHED / f"{name}.json").read_text())["model"] for name in EXPECTED}
    assert "never applied unasked" in hashes["pythia-1b"]["weights_are"] and "weights_sha256" not in hashes["pythia-1b"]
    for weights in ((), ("0" * 64,)):
        model = SimpleNamespace(name="pythia-1b", n_layers=16, n_heads=8, labels_file=None, weights=weights)
        assert labels.choose_labels(None, model, never) is None
    assert labels.choose_labels("pythia-1b", model, never).heads == set(map(Head.parse, ("4.4", "7.0", "7.1")))
    known = SimpleNamespace(name="x", n_layers=12, n_heads=12, labels_file=None,
                            weights=tuple(hashes["gpt2"]["weights_sha256"]))  # fmt: skip
    assert labels.choose_labels(None, known, never).kind == "attention"


def test_the_models_own_labels_come_first_and_none_means_none(mini):
    own = labels.choose_labels(None, mini, never)
    written = json.loads(mini.labels_file.read_text(encoding="utf-8"))
    assert sorted(str(head) for head in own.heads) == written["induction_heads"] == ["1.0", "1.1"]
    assert own.source == written["source"]
    assert labels.choose_labels("none", mini, never) is None
