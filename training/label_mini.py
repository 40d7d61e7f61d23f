"""Label a model's induction heads by intervention and write its labels.json (how: common/causal.py).

python training/label_mini.py                        # models/mini/labels.json
python training/label_mini.py --model FOLDER --out labels.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli
from common.interventions import causal
from common.loading import models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini", help="mini or a folder (default mini)")
    parser.add_argument("--out", type=Path, default=models.MINI / "labels.json", help="where to write")
    args = parser.parse_args()
    content = causal.measure(models.load(args.model), progress=cli.progress).as_json()
    content["source"] += "; python training/label_mini.py"
    args.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for head, effects in content["effects_in_nats_with_95_percent_intervals"].items():
        kind = next((kind for kind in ("induction", "suppression") if head in content[f"{kind}_heads"]), "")
        print(head, effects, kind)


if __name__ == "__main__":
    main()
