"""Labels: files a user may get wrong, the published table, and which of them is chosen."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from common import UserError
from common.attention.head import Head
from common.heads import labels
from common.heads.labels import Labels


def test_labels_are_read(tmp_path):
    path = tmp_path / "labels.json"
    path.write_text(json.dumps({"source": "by hand", "induction_heads": ["1.2", "0.0"]}))
    assert labels.read_labels(path, 2, 3) == Labels(frozenset({Head.at(1, 2), Head.at(0, 0)}), "by hand")


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
        ('{"induction_heads": ["0.3"]}', "no head 0.3"),
    ],
)
def test_wrong_label_files_say_what_is_wrong(tmp_path, text, reason):
    path = tmp_path / "labels.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=reason):
        labels.read_labels(path, 2, 3)


def test_a_missing_label_file_is_said(tmp_path):
    with pytest.raises(UserError, match="cannot read labels"):
        labels.read_labels(tmp_path / "none.json", 2, 3)


GPT2_SMALL = SimpleNamespace(
    name="gpt2", n_layers=12, n_heads=12, labels_file=None, bridge=SimpleNamespace(cfg=SimpleNamespace(d_vocab=50257))
)


def never() -> Labels:
    raise AssertionError("nothing asked for causal labels")


def test_the_published_table_is_for_gpt2_small_alone(random_gpt2):
    known = labels.choose_labels(None, GPT2_SMALL, never)
    assert known == labels.choose_labels("published", GPT2_SMALL, never)
    assert {str(head) for head in known.heads} == {"5.1", "5.5", "6.9", "7.2", "7.10"}
    assert "2211.00593" in known.source
    pretender = replace(random_gpt2, name="gpt2")
    assert labels.choose_labels(None, pretender, never) is None, (
        "a model of that name and another shape has no such labels"
    )
    with pytest.raises(UserError, match="no published labels for gpt2"):
        labels.choose_labels("published", pretender, never)


def test_the_models_own_labels_come_first_and_none_means_none(mini):
    own = labels.choose_labels(None, mini, never)
    written = json.loads(mini.labels_file.read_text(encoding="utf-8"))
    assert sorted(str(head) for head in own.heads) == written["induction_heads"] == ["1.0", "1.1"]
    assert own.source == written["source"]
    assert labels.choose_labels("none", mini, never) is None
