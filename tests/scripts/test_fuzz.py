"""Whatever is typed, stored or damaged ends in a result or in one clear line and exit code 2.

About 3,000 cases. The seeds are fixed (`derandomize`), so a failure here repeats; cases are not shrunk, which would
take minutes where a case runs a script. What fuzzing found has a test of its own at the end.
"""

# ruff: noqa: PT017 (either outcome is right: a result, or an error that says something)

from __future__ import annotations

import argparse
import json
import re
import shutil
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import induction_head_detection as detection
import qk_circuit_analysis as analysis
from common import UserError, cli
from common.heads import labels, texts, tokens
from common.loading import escapes, find, load, loader
from common.results import draw, files
from tests.conftest import roughen, save_random_gpt2

ANY = settings(suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.generate))


def cases(count: int) -> settings:
    return settings(ANY, max_examples=count)


ODD = [
    "",
    " ",
    "   ",
    "\n",
    "\x00",
    "\x1b[31mred",
    "😀",
    "שלום עולם",
    "\u202egnihtemos",
    "\udc80\udcff",
    "a" * 10_000,
    "$x_1$",
    "\\frac{",
    "_" * 50,
    "<b>&amp;",
    "../../etc/passwd",
    "%s{}",
    "-",
    "--",
    "\ufeff",
    "e\u0301" * 9,
]
CHARS = st.characters(codec=None)  # lone surrogates too, which is how arguments that are no UTF-8 come in
TEXT = st.one_of(st.text(CHARS, max_size=40), st.sampled_from(ODD), st.text("ab ", max_size=30))
ARGUMENT = TEXT.filter(lambda text: "\x00" not in text)  # no system passes a zero byte on
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.from_regex(r"\d{1,3}\.\d{1,3}"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)


# --- functions ---


@cases(200)
@given(TEXT)
def test_escaped_text_is_printable_and_keeps_the_rest(text):
    shown = escapes.escaped(text)
    assert shown.isprintable() and shown.isprintable() == all(char.isprintable() for char in shown)
    assert text.isprintable() <= (shown == text)
    shown.encode("utf-8")


@cases(100)
@given(TEXT)
def test_text_in_a_picture_has_a_glyph_for_every_character(text):
    known = draw.get_font(draw.findfont("DejaVu Sans")).get_charmap()
    assert all(char == "\n" or ord(char) in known for char in draw.legible(text))
    assert len(draw.legible(text, 24)) <= 24


PARSERS = (cli.threshold, cli.positive, cli.whole_number, cli.number_or("auto", "all"))


@cases(300)
@given(
    st.sampled_from(PARSERS),
    TEXT
    | st.from_regex(r"-?\d{1,25}(\.\d*)?(e\d+)?", fullmatch=True)
    | st.sampled_from(["nan", "inf", "-0", "1e400", "²", "٣", "auto"]),
)
def test_numbers_are_read_or_refused(parse, text):
    try:
        value = parse(text)
    except argparse.ArgumentTypeError as error:
        assert str(error)
        return
    assert value is None or isinstance(value, str) or 0 <= value < 2**63


@pytest.fixture(scope="module")
def labels_file(tmp_path_factory):
    return tmp_path_factory.mktemp("labels") / "labels.json"


@cases(250)
@given(
    content=JSON.map(json.dumps)
    | JSON.map(lambda heads: json.dumps({"induction_heads": heads}))
    | st.lists(JSON).map(lambda heads: json.dumps({"induction_heads": heads}))
    | st.binary(max_size=30)
)
@example(content=b"\xff\xfe")
@example(content="[" * 100_000)
@example(content='{"induction_heads": ["0.0"], "source": {"a": "\\u001b[31m"}}')
def test_label_files_are_read_or_refused(labels_file, content):
    labels_file.write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        found = labels.read_labels(labels_file, 3, 4)
    except UserError as error:
        assert str(labels_file) in str(error)
        return
    assert found.mask((3, 4)).sum() == len(found.heads)


@cases(200)
@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=30), min_size=1, max_size=4))
def test_cells_of_any_token_lists_lie_in_the_past(rows):
    batch = tokens.TokenBatch.of([np.array([9, *row]) for row in rows], pad=9)
    for kind, cells in batch.cells.items():
        assert (cells.key <= cells.query).all() and (cells.query < batch.lengths[cells.row]).all()
        if kind == "prefix_matching":
            assert (cells.key < cells.query).all() and (cells.key > 1).all()
            same = batch.tokens[cells.row, cells.key - 1] == batch.tokens[cells.row, cells.query]
            assert same.all()


@cases(200)
@given(st.integers(0, 40), st.integers(-1, 40), st.integers(0, 2**63 - 1), st.integers(1, 3))
def test_batteries_are_drawn_or_refused(vocabulary, length, seed, rows):
    try:
        drawn = tokens.battery(np.arange(1, 1 + vocabulary), 0, rows=rows, length=length, seed=seed)
    except UserError:
        assert length < 8 or vocabulary < 7
        return
    assert drawn.repeats.tokens.shape == drawn.controls.tokens.shape == (rows, min(length, vocabulary + 1))
    assert tokens.continuing(drawn.repeats).any(1).all()


@cases(150)
@given(JSON | st.dictionaries(st.integers(), st.floats()) | st.lists(st.floats()).map(np.array))
def test_anything_becomes_json_without_nan(value):
    text = json.dumps(files.jsonable({"value": value}), allow_nan=False)
    assert "NaN" not in text and "Infinity" not in text


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


@cases(150)
@given(name=ARGUMENT | st.text(string.printable, min_size=1, max_size=300).filter(lambda name: "\x00" not in name))
def test_any_output_folder_is_written_or_refused_and_stays_inside(scratch, name):
    name = name.replace("/", "|") if name not in (".", "..") else "x"
    try:
        with files.output_folder(scratch / name) as folder:
            (folder / "results.json").write_text("{}")
    except UserError as error:
        assert "cannot write to" in str(error)
        return
    assert (scratch / name / "results.json").exists()
    assert not list(scratch.glob(".*.part"))


@cases(200)
@given(name=ARGUMENT)
@example(name="gpt2-smal")
@example(name="no/such/model")
@example(name="a/b/c")
@example(name="..")
def test_any_model_name_is_found_or_refused_in_one_line(tmp_path_factory, name):
    try:
        folder, _, _ = find.find_folder(name, lambda message: None)
    except UserError as error:
        assert str(error)
        return
    assert name in ("auto", "mini") or folder.is_dir()


WORDS = st.sampled_from(
    [
        "--model",
        "--text",
        "--out",
        "--layer",
        "--head",
        "--seed",
        "--threshold",
        "--labels",
        "--no-plots",
        "--dtype",
        "--batch-size",
        "--quiet",
        "--verbose",
        "--ablate",
        "--export",
        "--debug",
    ]
)


@cases(250)
@given(script=st.sampled_from([detection, analysis]), arguments=st.lists(WORDS | ARGUMENT, max_size=6))
def test_any_arguments_are_read_or_refused_in_one_line(script, arguments):
    seen = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cli, "run", lambda work, args, program: seen.append(args) or 0)
        patched.setattr(
            argparse.ArgumentParser, "_print_message", lambda self, message, file=None: seen.append(message)
        )
        try:
            assert script.main(arguments) == 0
        except SystemExit as stopped:
            assert stopped.code in (0, 2)
            if stopped.code == 2:
                assert len(seen) == 1 and seen[0].count("\n") == 1 and seen[0][:-1].isprintable()
    assert seen


# --- models that stay loaded ---


def word_tokenizer(folder: Path, words: int) -> PreTrainedTokenizerFast:
    """BOS and `words` tokens, one of which stands for every unknown word."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    known = {"<bos>": 0, **{word: number for number, word in enumerate(["?", *string.ascii_lowercase][:words], 1)}}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>").save_pretrained(folder)
    return len(known)


def save_small(folder: Path, *, layers: int, heads: int, context: int, words: int) -> Path:
    torch.manual_seed(0)
    size = word_tokenizer(folder, words)
    config = GPT2Config(
        vocab_size=size,
        n_positions=context,
        n_embd=4 * heads,
        n_layer=layers,
        n_head=heads,
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=0,
    )
    roughen(GPT2LMHeadModel(config)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def kept(tmp_path_factory, tokenizer):
    """Small models, loaded once: with the bundled tokenizer, and with a few words."""
    root = tmp_path_factory.mktemp("kept")
    return [
        load(str(save_random_gpt2(root / "bytes", tokenizer, layers=2, heads=2))),
        load(str(save_small(root / "words", layers=1, heads=1, context=12, words=5))),
    ]


def judge(main, arguments, capsys) -> int:
    """Run a script; the exit code, which is 0, or 2 with exactly one line that says why."""
    capsys.readouterr()
    try:
        code = main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    said = capsys.readouterr()
    assert code in (0, 2)
    assert "\x1b" not in said.out + said.err and "Traceback" not in said.err
    lines = said.err.splitlines()
    if code == 2:
        errors = [line for line in lines if not line.startswith(("loading", "model:", "warning:", "layer"))]
        assert len(errors) == 1 and len(errors[0]) > 20, lines
    return code


def check_results(folder: Path) -> None:
    content = (folder / "results.json").read_text(encoding="utf-8")
    results = json.loads(content, parse_constant=lambda name: pytest.fail(f"{name} in results.json"))
    assert sorted(path.name for path in folder.iterdir()) == results["files"]


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "--threshold": st.sampled_from(["dynamic", "0", "1", "0.05", "0.4", "1e-9"]) | TEXT,
        "--seed": st.integers(0, 2**63 - 1).map(str),
        "--batch-size": st.sampled_from(["1", "7", "64"]),
    },
)


@cases(300)
@given(which=st.integers(0, 1), written=st.lists(ARGUMENT, min_size=1, max_size=3), options=OPTIONS)
@example(which=1, written=["a b c d a b c d a b c"], options={})  # as long as the context
@example(which=1, written=["a b c d a b c d a b c d"], options={})  # one longer
@example(which=0, written=["a b"], options={})  # as many tokens as heads
@example(which=0, written=["a" * 10_000], options={})
def test_any_texts_through_the_first_script(kept, scratch, capsys, which, written, options):
    run_on_any_texts(detection.main, kept[which], scratch / "detection", written, options, ["--no-ablate"], capsys)


@cases(200)
@given(
    which=st.integers(0, 1),
    written=st.lists(ARGUMENT, min_size=1, max_size=2),
    options=OPTIONS,
    layer=st.sampled_from(["auto", "0", "1", "7"]),
    head=st.sampled_from(["auto", "all", "0", "9"]),
)
def test_any_texts_through_the_second_script(kept, scratch, capsys, which, written, options, layer, head):
    further = ["--layer", layer, "--head", head]
    run_on_any_texts(analysis.main, kept[which], scratch / "analysis", written, options, further, capsys)


@cases(2)
@given(written=st.lists(ARGUMENT, min_size=2, max_size=2))
@example(written=["中文 $x_1$ \\frac 中文 $x_1$ 😀", "שלום \x1b[31m שלום"])
@pytest.mark.filterwarnings("error")
def test_any_texts_are_drawn_without_a_warning(kept, scratch, capsys, written):
    written = [*written, "the cat sat the cat sat"]
    options = {"plots": ""}
    run_on_any_texts(detection.main, kept[0], scratch / "drawn", written, options, ["--no-ablate"], capsys)
    run_on_any_texts(analysis.main, kept[0], scratch / "drawn2", written, options, [], capsys)


def run_on_any_texts(main, model, out, written, options, further, capsys) -> None:
    arguments = ["--model", "kept", "--out", str(out), *further]
    arguments += [f"--text={text}" for text in written]
    if "plots" not in options:
        arguments += ["--no-plots", *(f"{flag}={value}" for flag, value in options.items())]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loader, "load", lambda name, **options: model)
        if judge(main, arguments, capsys) == 0:
            check_results(out)


@cases(150)
@given(which=st.integers(0, 1), written=TEXT)
def test_any_text_encodes_to_ids_of_the_model(kept, which, written):
    try:
        tokens = kept[which].encode(written)
    except UserError:
        return
    assert ((tokens >= 0) & (tokens < kept[which].bridge.cfg.d_vocab)).all()
    assert all(token.isprintable() for token in kept[which].strings(tokens[:50]))


@cases(150)
@given(tokens=st.lists(st.integers(0, 5), min_size=1, max_size=11), seed=st.integers(0, 2**63 - 1))
def test_any_tokens_are_scored(kept, tokens, seed):
    found = texts.score_text(kept[1], np.array([0, *tokens]), seed=seed, batch_size=8)
    assert (found.attention is None) == (found.queries == 0)
    if found.attention:
        assert ((found.attention.score >= 0) & (found.attention.score <= 1 + 1e-6)).all()


# --- models of all sizes, and damaged ones ---


@pytest.mark.parametrize(
    ("layers", "heads", "context", "words"),
    [
        (1, 1, 8, 7),
        (1, 1, 9, 8),
        (2, 1, 12, 7),
        (1, 3, 12, 9),
        (1, 8, 8, 12),
        (1, 2, 7, 12),
        (1, 2, 2, 12),
        (1, 2, 1, 12),
        (1, 2, 12, 6),
        (1, 2, 12, 2),
        (1, 2, 12, 1),
        (2, 2, 300, 26),
    ],
)
@pytest.mark.parametrize("main", [detection.main, analysis.main])
def test_models_of_one_layer_one_head_few_words_and_short_contexts(
    tmp_path, capsys, main, layers, heads, context, words
):
    folder = save_small(tmp_path / "m", layers=layers, heads=heads, context=context, words=words)
    arguments = ["--model", str(folder), "--no-plots", "--out", str(tmp_path / "o")]
    code = judge(main, [*arguments, "--text", " ".join("aabaab"[: max(context - 1, 1)])], capsys)
    assert code == (0 if context >= 8 and words >= 7 else 2)
    if code == 0:
        check_results(tmp_path / "o")


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    folder = save_small(tmp_path_factory.mktemp("damaged") / "m", layers=1, heads=2, context=12, words=5)
    return folder, {path.name: path.read_bytes() for path in folder.iterdir()}


def load_damaged(folder: Path) -> None:
    try:
        model = load(str(folder))
    except UserError as error:
        assert str(error)
        return
    assert model.n_layers >= 1


@cases(80)
@given(
    name=st.sampled_from(["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"]),
    start=st.floats(0, 1),
    length=st.integers(0, 12),
    new=st.binary(max_size=12),
    cut=st.booleans(),
)
def test_damaged_files_load_or_are_refused(damaged, name, start, length, new, cut):
    folder, files = damaged
    for other, content in files.items():
        (folder / other).write_bytes(content)
    content = files[name]
    at = int(start * len(content))
    (folder / name).write_bytes(content[:at] + new + (b"" if cut else content[at + length :]))
    load_damaged(folder)


@cases(80)
@given(
    key=st.sampled_from(
        [
            "n_layer",
            "n_head",
            "n_embd",
            "vocab_size",
            "n_positions",
            "model_type",
            "architectures",
            "activation_function",
            "bos_token_id",
            "layer_norm_epsilon",
            "scale_attn_weights",
            "n_inner",
        ]
    ),
    value=st.none()
    | st.booleans()
    | st.text(max_size=5)
    | st.lists(st.integers(0, 3), max_size=2)
    | st.integers(-3, 64),
)
def test_configurations_with_wrong_values_load_or_are_refused(damaged, key, value):
    folder, files = damaged
    for other, content in files.items():
        (folder / other).write_bytes(content)
    (folder / "config.json").write_text(json.dumps({**json.loads(files["config.json"]), key: value}))
    load_damaged(folder)


@cases(40)
@given(which=st.integers(0, 13), value=st.sampled_from([np.nan, np.inf, -np.inf, 1e38, 0.0]))
def test_weights_that_are_no_numbers_are_refused(damaged, which, value):
    folder, files = damaged
    for other, content in files.items():
        (folder / other).write_bytes(content)
    weights = load_file(folder / "model.safetensors")
    name = sorted(weights)[which % len(weights)]
    weights[name].view(-1)[0] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    try:
        model = load(str(folder))
    except UserError:
        assert value != 0.0
        return
    assert np.isfinite(value) or not re.search("weight|bias", name)
    assert model.n_heads == 2


# --- what was found ---


def test_weights_that_lack_a_tensor_are_not_made_up(tmp_path, random_gpt2_folder):
    folder = shutil.copytree(random_gpt2_folder, tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    del weights["transformer.h.1.attn.c_attn.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="1 are missing, such as transformer.h.1.attn.c_attn.weight"):
        load(str(folder))


def test_a_text_that_is_no_unicode_is_said(mini):
    with pytest.raises(UserError, match=r"'caf\\udce9' is not UTF-8 \(character 3\)"):
        mini.encode("caf\udce9")


def test_an_empty_text_is_bos_alone(mini):
    assert mini.encode("").tolist() == [mini.bos]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_behind_the_last_pattern_are_looked_at(tmp_path, random_gpt2_folder, value):
    folder = shutil.copytree(random_gpt2_folder, tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    weights["transformer.h.2.mlp.c_proj.bias"][3] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="h.2.mlp.*NaN or infinite"):
        load(str(folder))


@pytest.mark.parametrize("option", ["text", "model", "out", "labels"])
def test_two_dashes_are_no_value(option, capsys):
    assert judge(detection.main, [f"--{option}=--"], capsys) == 2
