"""Let a model go on with a text, with its induction heads and without them.

    python -m examples.continue_text --text "red green blue red green"
    python -m examples.continue_text --model gpt2 --text "one two three one" --count 3 --picture one.png

"Without" means that the heads may not attend to the tokens after earlier copies of the current one; everything else
stays. The control takes the same cells from as many other heads of the same layers, drawn at random.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.heads import scores
from common.heads.statistics import Ints
from common.heads.survey import survey
from common.heads.tokens import TokenBatch
from common.interventions import effects
from common.interventions.edits import knockout
from common.loading import Model, load
from common.results import plots

Places = Sequence[tuple[int, int]]  # (layer, head) of some heads

DRAWN = 2  # heads in the picture


def main() -> None:
    args = arguments()
    model = load(args.model)
    found = [head.place for head in survey(model, seed=args.seed, batch_size=8).found.ranked()]
    print(f"Induction heads: {effects.names(found) or 'none'}")
    ways = {"with all heads": (), "without the induction heads": found}
    if found and (others := effects.layer_matched(found, model.n_heads, count=1, seed=args.seed)):
        ways[f"without {effects.names(others[0])}, for comparison"] = others[0]
    for number, text in enumerate(args.text):
        tokens = model.encode(text)
        print(f"\n{text}")
        for way, heads in ways.items():
            print(f"  {way + ':':<36}{''.join(model.strings(grow(model, tokens, args.count, heads)))}")
        if args.picture and found and not number:
            draw(model, tokens, args.count, found[:DRAWN], text, args.picture)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini", help="as in the two scripts (default mini)")
    parser.add_argument("--text", action="append", required=True, help="a text to go on with; repeat for more")
    parser.add_argument("--count", type=int, default=6, help="tokens to add (default 6)")
    parser.add_argument("--seed", type=int, default=0, help="draws the random rows and heads (default 0)")
    parser.add_argument("--picture", type=Path, help="a PNG of what the induction heads do on the first text, grown")
    return parser.parse_args()


def grow(model: Model, tokens: Ints, count: int, without: Places) -> Ints:
    """The `count` likeliest next ids, the heads `without` kept from their induction cells."""
    if not without:
        return effects.continuation(model, tokens, count)
    return effects.continuation(model, tokens, count, lambda row: knockout(without, row.cells["prefix_matching"]))


def draw(model: Model, tokens: Ints, count: int, heads: Places, text: str, path: Path) -> None:
    """The patterns of some heads on a text and what the model adds to it."""
    grown = np.concatenate([tokens, effects.continuation(model, tokens, count)])
    cells = TokenBatch.of([grown], pad=model.bos).cells["prefix_matching"]
    titles = [f"head {effects.names([head])}" for head in heads]
    panels = list(zip(titles, scores.patterns(model, grown, heads), strict=True))
    places = list(zip(cells.query.tolist(), cells.key.tolist(), strict=True))
    figure = plots.attention_grid(panels, model.strings(grown), places, f"{model.name}: {text} [+ {count} tokens]")
    path.parent.mkdir(parents=True, exist_ok=True)
    plots.save(figure, path)


if __name__ == "__main__":
    main()
