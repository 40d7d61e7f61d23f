"""Put the committed results of the benchmarks into the README.

    python -m benchmarks.readme

The README holds blocks between `<!-- NAME -->` and `<!-- /NAME -->`. Each is written by the function of that name below
from `benchmarks/results/*.json`, and nothing else in the README quotes a benchmark. A test fails when they part.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.detection import NEGATIVE, RESULTS, chosen

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCK = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- /\2 -->)", re.DOTALL)


def main() -> None:
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")


def filled(text: str) -> str:
    """The text with every block written anew. Raises KeyError for a block that has no function here."""
    return BLOCK.sub(lambda block: f"{block[1]}{BLOCKS[block[2]]()}\n{block[3]}", text)


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return content


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def detection() -> str:
    """Each method at its best threshold and at the usual one."""
    content = read("detection")
    rows = []
    for entry in chosen(content["summary"]):
        scores = [f"{entry[kind]:.2f}" for kind in ("precision", "recall", "f1")]
        weak = f"{entry['recall_by_strength']['0.05']:.2f}"
        name = {"dynamic": "**ours**"}.get(entry["method"], entry["method"])
        false = f"{entry['false_per_1000']['decoys']:.0f}"
        rows.append([name, "yes" if entry["effect_rule"] else "no", *scores, weak, false])
    columns = ["method", "effect rule", "precision", "recall", "F1", "recall of weak heads", "false, per 1,000"]
    models = content["arguments"]
    decisions = content["summary"][0]["decisions"]
    others = sum(decisions[group] for group in NEGATIVE if group != "decoys")
    worst = max(entry["false_per_1000"][group] for entry in content["summary"][:2] for group in NEGATIVE)
    return "\n".join(
        [
            table(columns, rows),
            "",
            f"{models['models']} hand-built models and {models['decoys']} of decoys, rows of 24 to 256 tokens. Weak: at "
            f"most 0.05 of the attention on the targets. False: on {decisions['decoys']:,} decoys that copy what they look "
            f"at; on {others:,} random and untrained heads ours has {worst:.1f}.",
        ]
    )


BLOCKS = {function.__name__: function for function in (detection,)}

if __name__ == "__main__":
    sys.exit(main())
