"""Label a model's induction heads by intervention and write its labels.json.

How: common/interventions/causal_labels.py.

python -m training.label_mini                        # models/mini/labels.json
python -m training.label_mini --model FOLDER --out labels.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from common.interventions.causal_labels import measure_causal_effects
from common.loading import load
from common.loading.find import MINI
from common.results import report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini", help="mini or a folder (default mini)")
    parser.add_argument("--out", type=Path, default=MINI / "labels.json", help="where to write")
    args = parser.parse_args()
    content = measure_causal_effects(load(args.model), progress=report.progress).as_json()
    content["source"] += "; python -m training.label_mini"
    args.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for head, effects in content["effects_in_nats_with_95_percent_intervals"].items():
        kind = next((kind for kind in ("induction", "suppression") if head in content[f"{kind}_heads"]), "")
        print(head, effects, kind)


if __name__ == "__main__":
    main()
