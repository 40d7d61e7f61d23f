"""README.md and docs/evidence.md say what was measured: each number comes from a committed result or is a constant."""

from __future__ import annotations

import contextlib
import io
import re
import shlex

import pytest

import qk_circuit_analysis
from benchmarks import readme
from common.heads import detection, survey, texts, tokens
from common.interventions import ablation, causal_labels, effects
from common.results import figures_heads
from tests.conftest import ROOT

NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in readme.PAGES)

# What may stand in running text, by what it is. Any other number comes from a measurement and belongs in a block.
CONSTANTS = {
    "least lift": detection.LEAST_LIFT,
    "notable": detection.NOTABLE,
    "least effect": detection.LEAST_EFFECT,
    "sure": survey.SURE,
    "most rows": survey.MOST_ROWS,
    "effect rows of a lot": survey.EFFECT_ROWS,
    "fewest words": tokens.SHORTEST - 1,
    "control texts": texts.CONTROL_ROWS,
    "a text and its controls": texts.CONTROL_ROWS + 1,
    "ablation rows": ablation.ABLATION_ROWS,
    "label rows": causal_labels.LABEL_ROWS,
    "random heads": effects.CONTROLS,
    "tokens drawn": figures_heads.LONGEST,
}
NAMED = {
    "a layer, a head, the exit codes, an index": ("0", "1", "2", "-1"),
    "intervals, in per cent": ("95",),
    "exit after Ctrl-C": ("130",),
    "the oldest Python": ("3.10",),
    "GPT-2, SmolLM2-135M, Gemma 2 and 3, Qwen 3": ("2", "3"),
    "rows in which intervals are tried, strengths that are planted, the reference of the speed table": (
        "5", "8", "16", "32", "0.02", "0.99", "257",
    ),
    "largest error of a map that is drawn": ("1e-4",),
    "published: nine draws of random heads, arXiv 2605.24059": ("0.65", "36"),
    "lengths in tests/heads/test_scores_fast.py": ("4,096",),
    "what is made less often than stated": ("500",),
}  # fmt: skip


def prose(text: str) -> str:
    """Without blocks, code, links, tables, pictures and the names of files and heads."""
    text = readme.BLOCK.sub("", text)
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"`[^`]*`|\]\([^)]*\)|arXiv [\d.]+|https?://\S+", "", text)
    text = "\n".join(line for line in text.splitlines() if not line.startswith(("|", "#")))
    return re.sub(r"(?m)^\d+\. |\b[A-Z][A-Za-z]*[-\d]+\w*|SHA-256", "", text)


def test_pages_and_results_say_the_same():
    for page in readme.PAGES:
        text = page.read_text(encoding="utf-8")
        assert readme.filled(text) == text, f"{page.name} and the results part: python -m benchmarks.readme"


def test_every_block_that_can_be_written_stands_on_a_page():
    assert {name for _, name, _ in readme.BLOCK.findall(TEXT)} == set(readme.BLOCKS)


def test_every_number_in_running_text_is_a_constant_or_is_named():
    known = {f"{value:g}" for value in CONSTANTS.values()} | {one for some in NAMED.values() for one in some}
    strange = {
        number
        for page in readme.PAGES
        for number in NUMBER.findall(prose(page.read_text(encoding="utf-8")))
        if number.rstrip(",") not in known
    }
    assert strange == set(), "a measured number belongs in a block of benchmarks/readme.py"


def test_a_page_with_a_measured_number_outside_of_a_block_is_noticed():
    assert NUMBER.findall(prose("It finds 0.97 of them.\n<!-- judges -->\n0.5\n<!-- /judges -->")) == ["0.97"]


def test_a_table_that_parts_from_the_results_is_noticed():
    text = readme.PAGES[1].read_text(encoding="utf-8")
    (table,) = (block[0] for block in readme.BLOCK.finditer(text) if block[2] == "detection")
    changed = text.replace(table, table.replace("1.00", "0.99"))
    assert changed != text and readme.filled(changed) == text


def close(shown: str, now: str) -> bool:
    """The same words, and numbers that differ by no more than rounding on another machine."""
    words = [NUMBER.sub("#", text).split() for text in (shown, now)]
    numbers = [[float(one.replace(",", "")) for one in NUMBER.findall(text)] for text in (shown, now)]
    return words[0] == words[1] and numbers[0] == pytest.approx(numbers[1], rel=0.02, abs=0.02)


def test_the_example_of_the_readme_prints_what_is_shown(tmp_path):
    command = readme.RUNS["run_example"]
    arguments = shlex.split(command)[2:]
    arguments[arguments.index("--out") + 1] = str(tmp_path / "out")
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert qk_circuit_analysis.main(arguments) == 0
    shown, now = (text.partition("Written to")[0] for text in (readme.read("runs")[command], output.getvalue()))
    assert close(shown, now), "python -m benchmarks.readme --runs"
    assert not close(shown.replace("embed", "mlp0"), now)


def test_the_commands_of_the_readme_exist():
    for command in set(re.findall(r"`python -m (benchmarks\.\w+|training\.\w+|examples\.\w+)", TEXT)):
        path = ROOT / command.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), command
