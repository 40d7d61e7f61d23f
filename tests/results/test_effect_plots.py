"""Pictures of effects, checked through their artists."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
from common.interventions.qk_interventions import KINDS, PATHS, THROUGH, WHOLE

from common.interventions.ablation import Ablation
from common.results import effect_plots


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


def test_names_stand_away_from_the_nearest_mark():
    score, effect = np.array([0.93, 0.94, 0.2, 0.5]), np.array([2.6, 2.5, 0.1, -0.4])
    assert effect_plots.named_on_the_right(score, effect)[:2] == [False, True]
    assert effect_plots.named_on_the_right(score[::-1], effect[::-1])[2:] == [True, False]
    assert effect_plots.named_on_the_right(np.array([0.5, 0.5]), np.array([1.0, 1.0])) == [False, True]
    assert effect_plots.named_on_the_right(np.array([0.5]), np.array([1.0])) == [True]
    assert effect_plots.named_on_the_right(np.array([]), np.array([])) == []


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


# --- parts of a head, paths ---


def part(kind: str, metric: str, size: float, control: float | None = 0.0, which: str = "1.0") -> dict:
    return effect(which, kind, metric, size, control) | {"clean": 0.9}


PARTS = [
    part(kind, metric, size + place, None if kind == "mean" else 0.5)
    for place, kind in enumerate(KINDS)
    for metric, size in (("prefix_matching", -10.0), ("loss_at_repeats", 20.0), ("loss_at_fresh", 40.0))
]


def test_every_part_stands_at_its_effect_beside_its_control(axes):
    effect_plots.part_bars(axes, PARTS, ["loss_at_repeats", "loss_at_fresh"])
    drawn = [line for line in axes.lines if line.get_marker() in ("o", "^", "s")]
    at = {kind: [line.get_xdata()[0] for line in drawn if line.get_marker() == kind] for kind in ("o", "^", "s")}
    assert at == {"o": [20 + n for n in range(7)], "^": [40 + n for n in range(7)], "s": [0.5] * 6}
    ends = [tuple(line.get_xdata()) for line in axes.lines if line.get_marker() == "None"]
    assert {(20 + n - 0.2, 20 + n + 0.2) for n in range(7)} | {(0.4, 0.6)} <= set(ends)
    assert [label.get_text() for label in axes.get_yticklabels()] == list(effect_plots.PARTS.values())


def test_effects_too_small_to_matter_do_not_fill_the_axes(axes):
    tiny = [one | {"effect": 1e-4, "interval": [0.0, 2e-4], "control": None} for one in PARTS]
    effect_plots.part_bars(axes, tiny, ["prefix_matching"])
    low, high = axes.get_xlim()
    assert low <= -effect_plots.LEAST_EFFECT and high >= effect_plots.LEAST_EFFECT


def path(sender: str, which: str, metric: str, size: float) -> dict:
    return part(which, metric, size) | {"sender": sender}


def test_each_path_has_its_place_in_the_map_and_the_strongest_is_framed_and_named(axes):
    """The whole sender is no path, however large; what was not measured is blank."""
    columns = [*PATHS, WHOLE]
    found = [path("0.1", which, "prefix_matching", -place / 10) for place, which in enumerate(columns)]
    found += [path("0.0", "path to key", "prefix_matching", -0.55), path("0.0", "path to key", "loss_at_repeats", 9.0)]
    effect_plots.path_map(axes, found, "prefix_matching", ["0.0", "0.1"])
    drawn = axes.images[0].get_array()
    assert drawn[1].tolist() == pytest.approx([-place / 10 for place in range(7)])
    assert drawn[0, 1] == -0.55 and drawn.mask[0].tolist() == [True, False, *[True] * 5]
    low, high = axes.images[0].get_clim()
    assert (low, high) == (-0.6, 0.6)
    (frame,) = axes.patches
    assert frame.get_xy() == (0.5, -0.5)
    assert "strongest path: 0.0 → key, direct: -0.55" in axes.get_title()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["query", "key", "values"] * 2 + ["all paths"]


def test_a_map_says_which_paths_were_not_measured(axes):
    found = [path("0.1", which, "prefix_matching", -0.1) for which in (*PATHS, WHOLE) if THROUGH not in which]
    effect_plots.path_map(axes, found, "prefix_matching", ["0.1"])
    assert "through MLPs too: not measured" in [text.get_text() for text in axes.texts]
    assert "direct path" in [text.get_text() for text in axes.texts]


def test_of_many_senders_those_that_matter_are_drawn_in_their_order():
    found = [
        path(f"{number // 8}.{number % 8}", which, metric, 1.0 if number in (3, 38) else 0.001)
        for number in range(40) for which in PATHS for metric in effect_plots.PATH_TITLES
    ]  # fmt: skip
    figure = effect_plots.path_figure(found, "title")
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(labels) == effect_plots.MOST_SENDERS and labels == sorted(labels)
    assert {"0.3", "4.6"} <= set(labels)
    assert "30 of 40 earlier heads" in figure.get_suptitle()
    plt.close(figure)


def test_every_head_has_a_picture_of_its_parts_and_the_receiver_one_of_paths():
    parts = [one | {"head": head} for head in ("1.0", "1.3") for one in PARTS]
    paths = [path("0.1", which, metric, 0.1) for which in PATHS for metric in effect_plots.PATH_TITLES]
    stems = [stem for stem, _ in effect_plots.intervention_figures(parts + paths, "mini")]
    assert stems == ["parts_1.0", "parts_1.3", "paths_1.0"]
    assert list(effect_plots.intervention_figures([], "mini")) == []
    plt.close("all")
