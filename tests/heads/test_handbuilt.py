"""The hand-built models are what they say: each kind of head attends and writes as named, at every row length."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from common.heads import scores
from common.heads.statistics import Ints
from common.heads.tokens import Battery, TokenBatch, battery, continuing
from common.loading import Model, load
from tests import handbuilt
from tests.handbuilt import COPY, VERDICTS, HandBuilt, Role

LENGTHS = (32, 64, 128, 256)
SEEDS = range(3)  # the benchmark's models have other seeds

EVERY_KIND = {
    (0, 0): Role("previous-token", slot=0),
    (0, 1): Role("previous-token", strength=0.6),
    (0, 2): Role("fixed-offset", strength=0.8, offset=5, writing=0.08),
    (0, 3): Role("fixed-offset", offset=0),
    (0, 4): Role("duplicate-token", writing=0.08),
    (0, 5): Role("bos-sink"),
    (0, 6): Role("uniform"),
    (0, 7): Role("random"),
    (1, 0): Role("induction", strength=0.95, slot=0, writing=COPY),
    (1, 1): Role("induction", strength=0.5, slot=0, writing=COPY),
    (1, 2): Role("induction", strength=0.1, slot=0, writing=COPY),
    (1, 3): Role("suppression", strength=0.7, slot=0, writing=-COPY),
    (1, 4): Role("attends-only", strength=0.3, slot=0),
    (1, 5): Role("before-duplicate", slot=0),
    (1, 6): Role("fixed-offset", offset=15),
    (1, 7): Role("fixed-offset", offset=22, strength=0.5),
    (0, 8): Role("recency", writing=0.08),
    (1, 8): Role("salient", writing=0.08),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer):
    """A function that saves a hand-built model and loads it as a user's model is loaded."""

    def save(built: HandBuilt) -> Model:
        return load(str(handbuilt.save(built, tmp_path_factory.mktemp("handbuilt"), tokenizer)))

    return save


@pytest.fixture(scope="module")
def every_kind(saved, tokenizer) -> Model:
    return saved(handbuilt.assemble(EVERY_KIND, vocabulary=len(tokenizer), seed=0))


@pytest.fixture(scope="module", params=SEEDS)
def random_model(request, saved, tokenizer) -> tuple[HandBuilt, Model]:
    built = handbuilt.build(request.param, vocabulary=len(tokenizer))
    return built, saved(built)


def draw(model: Model, *, rows: int, length: int) -> Battery:
    return battery(model.ordinary(), model.bos, rows=rows, length=length, seed=50)


def lift(model: Model, drawn: Battery) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prefix matching on the repeats, its difference to that on the controls, and four standard errors of the latter.

    Each [layers, heads].
    """
    on, off = (scores.score(model, rows, batch_size=8) for rows in (drawn.repeats, drawn.controls))
    sums = off.sums["prefix_matching"]
    rows = len(sums.counts)
    error = np.sqrt(sums.squares_between(np.ones((1, rows)))[0] / (rows - 1) / rows)
    score = on.mean("prefix_matching")
    return score, score - off.mean("prefix_matching"), 4 * np.sqrt(2) * error


def test_the_kinds_built_here_are_all_there_are():
    assert {role.kind for role in EVERY_KIND.values()} == set(VERDICTS)


def test_score_table_derived_on_paper(saved, tokenizer):
    """On the row BOS a b c a b c, positions 0 to 6.

    prefix_matching: queries 4, 5, 6 have the one target 2, 3, 4 each (query - 2). duplicate_token: the same queries,
    cells 1, 2, 3. previous_token: queries 2 to 6. first_token and current_token: queries 1 to 6.

    0.0 previous token: query i attends to i - 1; query 1 to BOS. With strength 0.99, the rest on BOS:
        previous 0.99, first (1 + 5 x 0.01) / 6.
    0.1 uniform: query i gives 1 / (i + 1) to each key.
    0.2 fixed offset 2: queries 3 to 6 attend to i - 2, query 2 to BOS (i - 2 = 0), query 1 to BOS for want of a key.
        On this row that is exactly where an induction head looks. Strength 0.99: prefix 0.99, first (2 + 4 x 0.01) / 6.
    1.0 induction of strength 0.75: queries 4, 5, 6 give 0.75 to the target, 0.25 to BOS; others rest on BOS:
        prefix 0.75, first (3 + 3 x 0.25) / 6 = 0.625.
    1.1 duplicate token: queries 4, 5, 6 attend to the earlier copy, others to BOS: duplicate 1, first 3 / 6.
    1.2 BOS sink: first 1.
    """
    expected = {
        "prefix_matching": [[0, (1 / 5 + 1 / 6 + 1 / 7) / 3, 0.99], [0.75, 0, 0]],
        "previous_token": [[0.99, (1 / 3 + 1 / 4 + 1 / 5 + 1 / 6 + 1 / 7) / 5, 0], [0, 0, 0]],
        "duplicate_token": [[0, (1 / 5 + 1 / 6 + 1 / 7) / 3, 0], [0, 1, 0]],
        "first_token": [
            [1.05 / 6, (1 / 2 + 1 / 3 + 1 / 4 + 1 / 5 + 1 / 6 + 1 / 7) / 6, 2.04 / 6],
            [3.75 / 6, 3 / 6, 1],
        ],
        "current_token": [[0, (1 / 2 + 1 / 3 + 1 / 4 + 1 / 5 + 1 / 6 + 1 / 7) / 6, 0], [0, 0, 0]],
    }
    model = saved(handbuilt.paper_case(vocabulary=len(tokenizer)))
    row = TokenBatch.of([np.array([model.bos, 70, 80, 90, 70, 80, 90])], pad=model.bos)
    measured = scores.score(model, row, batch_size=1)
    for head_type, table in expected.items():
        assert measured.mean(head_type) == pytest.approx(np.array(table), abs=0.01), head_type


def oracle(role: Role, tokens: Ints) -> np.ndarray:
    """Where a head of this role puts how much of its attention, [query, key], from the definition of its kind."""
    pattern = np.zeros((len(tokens), len(tokens)))
    for query in range(len(tokens)):
        copies = [key for key in range(1, query) if tokens[key] == tokens[query]]
        same_before = [key for key in range(1, query - 1) if tokens[key] == tokens[query - 1]]
        back = [query - role.offset] if query >= role.offset else []
        wanted = {
            "induction": [key + 1 for key in copies],
            "previous-token": back,
            "fixed-offset": back,
            "duplicate-token": copies,
            "before-duplicate": same_before,
        }
        for kind in ("suppression", "attends-only"):
            wanted[kind] = wanted["induction"]
        if role.kind == "uniform":
            pattern[query, : query + 1] = 1 / (query + 1)
            continue
        if role.kind == "recency":  # a quarter turn over the context; its sine is what every query asks for
            late = np.exp(handbuilt.DRIFT * np.sin(np.arange(query + 1) * np.pi / 2 / handbuilt.CONTEXT))
            pattern[query, : query + 1] = late / late.sum()
            continue
        for key in wanted.get(role.kind, []):
            pattern[query, key] = role.strength
        pattern[query, 0] += 1 - pattern[query].sum()
    return pattern


@pytest.mark.parametrize("length", LENGTHS)
def test_every_kind_attends_as_its_definition_says(every_kind, length):
    known = {head: role for head, role in EVERY_KIND.items() if role.kind not in ("random", "salient")}
    for tokens in draw(every_kind, rows=2, length=length).repeats.tokens:
        shown = scores.patterns(every_kind, tokens, list(known))
        for (head, role), pattern in zip(known.items(), shown, strict=True):
            error = np.abs(pattern - oracle(role, tokens)).max(1)
            assert np.quantile(error, 0.95) <= 0.03, (head, role)
            assert error.mean() <= 0.03, (head, role)


@pytest.mark.parametrize("length", LENGTHS)
def test_only_heads_on_the_targets_lift_their_score_over_the_control(random_model, length):
    built, model = random_model
    score, over_control, by_chance = lift(model, draw(model, rows=8, length=length))
    for head, role in built.roles.items():
        if role.kind in handbuilt.ON_TARGETS:
            assert score[head] == pytest.approx(role.strength, abs=0.03), (head, role)
            assert over_control[head] == pytest.approx(role.strength, abs=0.03), (head, role)
        else:
            allowed = by_chance[head] if role.kind in ("random", "salient") else 0.005
            assert abs(over_control[head]) <= allowed, (head, role)


def test_a_random_head_is_neither_uniform_nor_on_the_targets(every_kind):
    drawn = draw(every_kind, rows=8, length=64)
    pattern = scores.patterns(every_kind, drawn.repeats.tokens[0], [(0, 7)])[0]
    assert pattern[-1].max() >= 3 / 64
    _, over_control, by_chance = lift(every_kind, drawn)
    assert abs(over_control[0, 7]) <= by_chance[0, 7] <= 0.04


def test_a_salient_head_looks_for_the_same_tokens_from_everywhere(every_kind):
    """What each query pays to a key, over what it pays to BOS, depends on the key's token alone."""
    tokens = draw(every_kind, rows=1, length=64).repeats.tokens[0]
    pattern = scores.patterns(every_kind, tokens, [(1, 8)])[0][-1]
    turned = np.concatenate([tokens[:1], tokens[:0:-1]])
    backwards = scores.patterns(every_kind, turned, [(1, 8)])[0][-1]
    of_token = dict(zip(tokens.tolist(), pattern / pattern[0], strict=True))
    assert backwards / backwards[0] == pytest.approx([of_token[token] for token in turned.tolist()], rel=0.05)
    assert max(of_token.values()) > 20 * np.median(list(of_token.values())), "a heavy tail"


def test_decoys_copy_and_none_attends_to_the_targets(tokenizer):
    kinds = set()
    for seed in range(20):
        roles = handbuilt.decoys(seed, vocabulary=len(tokenizer)).roles.values()
        assert all(role.writing == handbuilt.DECOY_COPY for role in roles)
        kinds |= {role.kind for role in roles}
    assert kinds == set(VERDICTS) - set(handbuilt.ON_TARGETS) - {"before-duplicate"}


@pytest.mark.parametrize("weakest", [0.02, 0.1])
def test_strengths_reach_down_to_the_weakest(weakest):
    drawn = [handbuilt.draw_roles(np.random.default_rng(seed), weakest) for seed in range(300)]
    strengths = [role.strength for roles in drawn for role in roles.values() if role.kind == "induction"]
    assert weakest <= min(strengths) < 1.3 * weakest


def silenced(built: HandBuilt, heads: list[tuple[int, int]]) -> HandBuilt:
    """A copy whose `heads` write nothing."""
    model = copy.deepcopy(built.model)
    d_head = model.config.n_embd // model.config.n_head
    with torch.no_grad():
        for layer, head in heads:
            model.transformer.h[layer].attn.c_proj.weight[head * d_head : (head + 1) * d_head] = 0
    return HandBuilt(model, built.roles)


def loss_at_repeats(built: HandBuilt) -> float:
    """Mean loss at the tokens that continue a repeat, in nats."""
    rows = battery(np.arange(1, built.model.config.vocab_size), 0, rows=8, length=64, seed=50).repeats
    tokens = torch.from_numpy(rows.tokens)
    with torch.inference_mode():
        logits = built.model(tokens).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    return loss[torch.from_numpy(continuing(rows)[:, 1:])].mean().item()


def test_induction_heads_lower_the_loss_at_repeats_and_nothing_else_does(random_model):
    built, _ = random_model
    chance = np.log(built.model.config.vocab_size)
    assert loss_at_repeats(built) <= chance - 1
    nearly = loss_at_repeats(silenced(built, built.heads("induction")))
    assert nearly >= chance - 0.4, "what decoys copy is right only by accident"
    assert loss_at_repeats(silenced(built, list(built.roles))) == pytest.approx(chance, abs=1e-4)


def test_writing_and_attending_are_separate(tokenizer):
    built = handbuilt.assemble(EVERY_KIND, vocabulary=len(tokenizer), seed=0)
    whole = loss_at_repeats(built)
    without = {kind: loss_at_repeats(silenced(built, built.heads(kind))) for kind in handbuilt.ON_TARGETS}
    assert without["induction"] >= whole + 1
    assert without["suppression"] <= whole - 0.1
    assert without["attends-only"] == pytest.approx(whole, abs=1e-6)


def test_without_its_previous_token_head_an_induction_head_finds_nothing(saved, tokenizer):
    built = handbuilt.assemble(EVERY_KIND, vocabulary=len(tokenizer), seed=0)
    model = saved(silenced(built, [(0, 0)]))
    assert lift(model, draw(model, rows=4, length=64))[0][1, :5].max() <= 0.01


def test_a_model_depends_on_its_seed_alone(tokenizer):
    one, again, other = (handbuilt.build(seed, vocabulary=len(tokenizer)) for seed in (3, 3, 4))
    assert one.roles == again.roles != other.roles
    for name, weights in one.model.state_dict().items():
        assert torch.equal(weights, again.model.state_dict()[name]), name


def test_every_seed_gives_what_the_benchmark_needs():
    drawn = [handbuilt.draw_roles(np.random.default_rng(seed)) for seed in range(400)]
    for roles in drawn:
        feeders = {
            role.slot: layer
            for (layer, _), role in roles.items()
            if role.kind == "previous-token" and role.slot is not None
        }
        induction = [(layer, role) for (layer, _), role in roles.items() if role.kind == "induction"]
        assert len(induction) >= 2
        assert all(feeders[role.slot] < layer for layer, role in induction)
        assert all(0.1 <= role.strength <= 0.99 for _, role in induction)
        assert max(role.strength for _, role in induction) >= 0.8
        assert sum(role.kind not in handbuilt.ON_TARGETS for role in roles.values()) >= 3
    assert {role.kind for roles in drawn for role in roles.values()} == set(VERDICTS)
    offsets = {role.offset for roles in drawn for role in roles.values() if role.kind == "fixed-offset"}
    assert len(offsets & set(range(15, 128))) >= 100
    assert offsets >= {0, 2, 12, 14, 30, 62, 126}
    assert 1 not in offsets


def test_layer_norm_is_in_place(tokenizer):
    """It divides: what enters has mean 0 and a known, small deviation, what leaves has deviation 1."""
    model = handbuilt.assemble(EVERY_KIND, vocabulary=len(tokenizer), seed=0).model
    seen = []
    model.transformer.h[1].ln_1.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    with torch.inference_mode():
        model(torch.arange(40)[None])
    before, after = seen[0]
    assert before.mean(-1).abs().max() <= 1e-3
    assert after.std(-1, correction=0).numpy() == pytest.approx(1.0, abs=1e-3)
    norm = np.sqrt(handbuilt.CONSTANT**2 + 4)  # and token, position, drift, slot
    assert before.norm(dim=-1).numpy() == pytest.approx(norm, rel=0.01)
