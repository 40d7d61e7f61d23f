"""Write labels as a reader would who trusts one picture: the heads that look inductive on one text.

    python -m examples.label_by_eye outputs/examples/own_sentence/results.json 0.3 outputs/examples/labels.json

Of the first text of a run, every head whose prefix matching is at least the number given.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(results: str, least: str, labels: str) -> None:
    entry = json.loads(Path(results).read_text(encoding="utf-8"))["sequences"][0]
    heads = [
        f"{head['layer']}.{head['head']}" for head in entry["heads"] if (head["prefix_matching"] or 0.0) >= float(least)
    ]
    said = f"by eye: prefix matching of {least} or more on one sentence"
    written = json.dumps({"kind": "attention", "source": said, "induction_heads": heads}, indent=1)
    Path(labels).write_text(written + "\n", encoding="utf-8")
    print(written)


if __name__ == "__main__":
    main(*sys.argv[1:])
