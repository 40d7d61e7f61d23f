"""Loading: what can be had is loaded and checked, what cannot is refused in one line that helps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from common import UserError
from common.loading import Model, load
from common.loading.loader import _bos
from common.results import find_induction_heads
from tests import architectures

# TransformerLens 4.3 splits the joint projection of the one wrongly, and has no sinks in what it shows of the other.
UNREADABLE = {"falcon-new", "gpt-oss"}
FAMILIES = [family for family in architectures.CAUSAL if family not in UNREADABLE]


def refusal(name: object, **options: object) -> str:
    """What is said where a model is refused: one line."""
    with pytest.raises(UserError) as error:
        load(str(name), **options)
    said = str(error.value)
    assert len(said.splitlines()) == 1 and said.strip() == said, "one line"
    return said


def test_a_folder_loads_with_what_the_scripts_need(random_gpt2, random_gpt2_folder):
    assert (random_gpt2.name, random_gpt2.n_layers, random_gpt2.n_heads) == ("random-gpt2", 3, 4)
    assert (random_gpt2.d_model, random_gpt2.context) == (32, 64)
    assert random_gpt2.d_vocab == len(random_gpt2.tokenizer)
    assert str(random_gpt2_folder) in random_gpt2.source
    assert len(random_gpt2.fingerprint) == 64
    assert random_gpt2.dtype == torch.float32 and random_gpt2.device.type == "cpu"
    assert random_gpt2.labels_file is None and not random_gpt2.refused


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_and_allows_all(of_family, family):
    model = of_family(family)
    assert isinstance(model, Model) and not model.refused
    assert (model.n_layers, model.n_heads, model.d_model) == (3, architectures.HEADS, architectures.D_MODEL)


@pytest.mark.parametrize("family", [*sorted(UNREADABLE), "falcon-alibi"])
def test_what_transformerlens_does_not_show_as_it_is_is_refused_by_name(family_folder, family):
    said = refusal(family_folder(family))
    assert family in said and ("self-check" in said or "TransformerLens cannot wrap" in said)


def test_the_bundled_model_loads_by_the_same_way_and_brings_its_labels(mini):
    assert mini.name == "mini" and mini.source == "bundled with this project"
    assert mini.labels_file is None or json.loads(mini.labels_file.read_text(encoding="utf-8"))


def test_labels_beside_the_weights_are_found(copied):
    (copied / "labels.json").write_text("{}")
    assert load(str(copied)).labels_file == copied / "labels.json"


def test_the_weights_ask_for_no_gradients_and_the_network_is_not_training(random_gpt2):
    assert not any(parameter.requires_grad for parameter in random_gpt2.door.network.parameters())
    assert not any(module.training for module in random_gpt2.door.network.modules())


def test_the_weights_are_those_of_the_bridge(random_gpt2):
    ours = {tensor.data_ptr() for tensor in random_gpt2.door.network.parameters()}
    theirs = {tensor.data_ptr() for tensor in random_gpt2.bridge.original_model.parameters()}
    assert ours <= theirs


def test_the_fingerprint_is_that_of_weights_and_configuration(copied, random_gpt2):
    assert load(str(copied)).fingerprint == random_gpt2.fingerprint
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "a_note": 1}))
    noted = load(str(copied)).fingerprint
    weights = load_file(copied / "model.safetensors")
    weights["transformer.ln_f.bias"][0] += 1
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    assert len({random_gpt2.fingerprint, noted, load(str(copied)).fingerprint}) == 3


@pytest.mark.parametrize(
    ("ids", "first", "named"),
    [
        ({"bos": 3, "eos": 7}, 3, None),
        ({"bos": 0, "eos": 7}, 0, None),
        ({"bos": None, "eos": 7}, 7, "EOS token '<eos>' (7)"),
        ({"bos": None, "eos": None, "cls": 2, "pad": 0}, 2, "CLS token '<cls>' (2)"),
        ({"bos": None, "pad": 0}, 0, "PAD token '<pad>' (0)"),
    ],
)
def test_a_row_starts_with_bos_and_what_stands_for_it_is_said(ids, first, named):
    names = {f"{name}_token_id": token for name, token in ids.items()} | {f"{name}_token": f"<{name}>" for name in ids}
    token, notes = _bos(SimpleNamespace(**names), "some model")
    assert token == first and len(notes) == (named is not None)
    assert not named or ("some model names no BOS token" in notes[0] and named in notes[0])


def test_without_any_special_token_there_is_no_bos_and_the_remedy_is_said():
    with pytest.raises(UserError, match=r"no BOS token.*tokenizer_config\.json"):
        _bos(SimpleNamespace(bos_token_id=None, eos_token_id=None), "some model")


def test_what_stands_for_bos_is_noted_in_results(copied):
    settings = json.loads((copied / "tokenizer_config.json").read_text())
    special = settings.pop("bos_token")
    settings["eos_token"] = special
    (copied / "tokenizer_config.json").write_text(
        json.dumps({**settings, "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    model = load(str(copied))
    found = find_induction_heads(model, batch_size=8, labels="none")
    (note,) = found.as_json()["notes"]
    assert "names no BOS token" in note["text"] and note["warning"] and "names no BOS token" in repr(found)
    assert special in note["text"] and model.bos == model.tokenizer.eos_token_id


def test_bfloat16_is_what_the_model_computes_in(random_gpt2_folder):
    model = load(str(random_gpt2_folder), dtype="bfloat16")
    assert model.dtype == torch.bfloat16 and not model.refused


# --- refused, in one line ---


def test_an_unknown_name_is_one_line(cache):
    assert "no-such-model" in refusal("no-such-model")


def test_a_file_is_no_model(copied):
    assert "is a file" in refusal(copied / "config.json")


def test_an_empty_folder_is_no_model(tmp_path):
    assert "no config.json" in refusal(tmp_path)


def test_a_folder_without_weights_is_refused(copied):
    (copied / "model.safetensors").unlink()
    said = refusal(copied)
    assert "no" in said and "model.safetensors weights" in said


def test_pickled_weights_are_refused_with_the_reason(copied):
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    assert "runs code when it is opened" in refusal(copied)


def test_truncated_weights_are_refused(copied):
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "do not load" in refusal(copied)


def test_weights_that_are_missing_are_not_drawn_at_random(copied):
    weights = load_file(copied / "model.safetensors")
    del weights["transformer.h.1.attn.c_attn.weight"]
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    said = refusal(copied)
    assert "1 are missing" in said and "h.1.attn.c_attn.weight" in said


def test_a_tokenizer_that_is_not_there_is_said(copied):
    for path in copied.glob("*token*"):
        path.unlink()
    for name in ("vocab.json", "merges.txt"):
        (copied / name).unlink(missing_ok=True)
    assert "tokenizer of" in refusal(copied)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_fail_the_self_check(copied, value):
    weights = load_file(copied / "model.safetensors")
    weights["transformer.h.1.attn.c_attn.weight"][:] = value
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    said = refusal(copied)
    assert "layer 1" in said and "NaN" in said


def test_a_single_weight_that_is_no_number_fails_the_self_check_though_no_pattern_shows_it(copied):
    weights = load_file(copied / "model.safetensors")
    weights["transformer.h.2.mlp.c_proj.weight"][3, 4] = torch.nan
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    assert "mlp.c_proj" in refusal(copied)


def test_logits_that_are_no_numbers_fail_the_self_check(copied):
    """Every weight is finite; their products are not."""
    weights = load_file(copied / "model.safetensors")
    weights["transformer.ln_f.weight"][:] = 3e38
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    assert "logits are NaN or infinite" in refusal(copied)


def test_a_model_of_no_known_type_is_refused(copied):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "model_type": "no-such-type", "architectures": ["X"]}))
    assert "do not load" in refusal(copied)


def test_a_model_without_attention_is_refused(tmp_path, tokenizer):
    import transformers

    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=len(tokenizer))
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    assert "mamba" in refusal(tmp_path / "mamba")


def test_a_family_whose_attention_cannot_be_exchanged_is_refused(tmp_path, tokenizer):
    import transformers

    config = transformers.XLNetConfig(d_model=32, n_layer=2, n_head=4, vocab_size=len(tokenizer), d_inner=32)
    transformers.XLNetLMHeadModel(config).save_pretrained(tmp_path / "xlnet")
    tokenizer.save_pretrained(tmp_path / "xlnet")
    assert "XLNetLMHeadModel cannot be read or edited" in refusal(tmp_path / "xlnet")


def test_an_unusable_device_is_said():
    assert "--device nonsense" in refusal("mini", device="nonsense")


def test_a_folder_named_as_an_old_alias_brings_no_warning(tmp_path, random_gpt2_folder, caplog):
    (tmp_path / "opt").symlink_to(Path(random_gpt2_folder))
    assert load(str(tmp_path / "opt")).n_layers == 3
    assert not caplog.records


def test_loading_leaves_the_folder_as_it_was(copied):
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    load(str(copied))
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before
    shutil.rmtree(copied)
