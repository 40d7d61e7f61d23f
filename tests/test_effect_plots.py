"""Pictures of effects, checked through their artists."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest

from common import effect_plots
from common.ablation import Ablation


@pytest.fixture
def axes():
    figure, axes = plt.subplots()
    yield axes
    plt.close(figure)


def head(number: int, verdict: str, score: float, effect: float, copying: float) -> dict:
    return {"layer": 1, "head": number, "verdict": verdict, "prefix_matching": score, "total_effect": effect,
            "copying": copying}  # fmt: skip


HEADS = [
    head(0, "induction", 0.9, 2.0, 0.9),
    head(1, "attends-only", 0.8, 0.01, 0.1),
    head(2, "suppression", 0.4, -0.7, -0.9),
    head(3, "none", 0.01, 0.0, 0.3),
]


def test_every_head_stands_at_its_score_and_effect_in_the_shape_of_its_verdict(axes):
    effect_plots.scatter(axes, HEADS, "title")
    drawn = np.concatenate([points.get_offsets() for points in axes.collections if len(points.get_offsets())])
    assert {tuple(point) for point in drawn.tolist()} == {
        (one["prefix_matching"], one["total_effect"]) for one in HEADS
    }
    colours = np.concatenate([points.get_array() for points in axes.collections if points.get_array() is not None])
    assert sorted(colours.tolist()) == sorted(one["copying"] for one in HEADS)
    named = {text.get_text() for text in axes.texts}
    assert named == {"1.0", "1.1", "1.2"}, "the head that does nothing and looks at nothing needs no name"


def effect(which: str, kind: str, metric: str, size: float, control: float | None) -> dict:
    beside = None if control is None else {"effect": control, "interval": [control - 0.1, control + 0.1]}
    return {"name": kind, "head": which, "metric": metric, "effect": size, "interval": [size - 0.2, size + 0.2],
            "control": beside}  # fmt: skip


def test_bars_show_repeats_fresh_tokens_and_random_heads(axes):
    ablation = Ablation("1.0 1.1", {}, {}, [
        effect("1.0", "mean", "loss_at_repeats", 2.0, 0.1),
        effect("1.0", "mean", "loss_at_fresh", 0.05, None),
        effect("1.0 1.1", "mean", "loss_at_repeats", 5.0, 0.3),
    ])  # fmt: skip
    effect_plots.ablation_bars(axes, ablation, "mean")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1.0", "all 2"]
    points = {line.get_marker(): line.get_xdata()[0] for line in axes.lines if line.get_marker() in "o^s"}
    assert set(points) == {"o", "^", "s"}
    at_repeats = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]
    assert at_repeats == [2.0, 5.0]
    figure = effect_plots.ablation_figure(ablation, "title")
    assert len(figure.axes) == 1, "forbidding was not measured and gets no panel"
    plt.close(figure)
