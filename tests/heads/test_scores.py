"""Scores against a slow oracle that keeps every pattern and loops over cells; and what must not change a score."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from common.heads import scores
from common.heads.tokens import HEAD_TYPES, TokenBatch, battery
from tests.heads.test_tokens import slow_cells

ROWS = [[5, 6, 7, 5, 6, 7, 5], [9, 9, 9, 4], [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2]]


@pytest.fixture(scope="module")
def batch(random_gpt2) -> TokenBatch:
    return TokenBatch.of([np.array([random_gpt2.bos, *row]) for row in ROWS], pad=random_gpt2.bos)


def slow_scores(folder, bos: int, rows: list[list[int]]) -> dict[str, np.ndarray]:
    """Transformers alone: all patterns of an unpadded, unbatched run; loop over layers, heads, queries, cells."""
    model = GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager")
    layers, heads = model.config.n_layer, model.config.n_head
    paid = {head_type: np.zeros((layers, heads)) for head_type in HEAD_TYPES}
    queries = dict.fromkeys(HEAD_TYPES, 0)
    for row in rows:
        tokens = [bos, *row]
        with torch.no_grad():
            attentions = model(torch.tensor([tokens]), output_attentions=True).attentions
        for head_type, cells in slow_cells(tokens).items():
            queries[head_type] += len({query for query, _ in cells})
            for layer in range(layers):
                for head in range(heads):
                    for query, key in cells:
                        paid[head_type][layer, head] += attentions[layer][0, head, query, key].item()
    return {head_type: paid[head_type] / queries[head_type] for head_type in HEAD_TYPES}


def spread(measured: scores.HeadScores, head_type: str) -> np.ndarray:
    """Standard deviation over rows, [layers, heads]."""
    sums = measured.sums[head_type]
    return np.sqrt(sums.squares_between(np.ones((1, len(sums.counts))))[0] / (len(sums.counts) - 1))


def test_scores_agree_with_the_slow_oracle(random_gpt2, random_gpt2_folder, batch):
    fast = scores.score(random_gpt2, batch, batch_size=2)
    for head_type, slow in slow_scores(random_gpt2_folder, random_gpt2.bos, ROWS).items():
        assert fast.mean(head_type) == pytest.approx(slow, abs=1e-6), head_type


def test_the_attention_budget_is_all_of_the_attention(random_gpt2, batch):
    """By the definition of other: what is left of 1, at queries with a target, from patterns read in full."""
    found = scores.score(random_gpt2, batch, batch_size=2).budget()
    assert sum(found.values()) == pytest.approx(np.ones((3, 4)))
    paid = {part: [] for part in found}
    for row in ROWS:
        tokens = [random_gpt2.bos, *row]
        pattern = scores.patterns(random_gpt2, np.array(tokens), [(2, 1)])[0]
        cells = slow_cells(tokens)
        for query in {query for query, _ in cells["prefix_matching"]}:
            left = dict(enumerate(pattern[query, : query + 1]))
            kinds = ("prefix_matching", "previous_token", "current_token", "duplicate_token", "first_token")
            for part, kind in zip(found, kinds, strict=False):
                paid[part].append(sum(left.pop(key, 0.0) for at, key in cells[kind] if at == query))
            paid["other"].append(sum(left.values()))
    for part, values in paid.items():
        assert found[part][2, 1] == pytest.approx(np.mean(values), abs=1e-6), part


def test_batch_size_row_order_and_padding_change_nothing(random_gpt2, batch):
    whole = scores.score(random_gpt2, batch, batch_size=3)
    single = scores.score(random_gpt2, batch, batch_size=1)
    turned = TokenBatch.of([np.array([random_gpt2.bos, *row]) for row in reversed(ROWS)], pad=7)
    backwards = scores.score(random_gpt2, turned, batch_size=2)
    for head_type in HEAD_TYPES:
        assert single.mean(head_type) == pytest.approx(whole.mean(head_type), abs=1e-6)
        assert backwards.mean(head_type) == pytest.approx(whole.mean(head_type), abs=1e-6)
        assert spread(backwards, head_type) == pytest.approx(spread(whole, head_type), abs=1e-6)


@pytest.mark.parametrize("row", [ROWS[0], [3, 4, 3]], ids=["longer", "as many tokens as heads"])
def test_patterns_are_those_of_the_heads_asked_for(random_gpt2, random_gpt2_folder, row):
    tokens = np.array([random_gpt2.bos, *row])
    model = GPT2LMHeadModel.from_pretrained(random_gpt2_folder, attn_implementation="eager")
    with torch.no_grad():
        attentions = model(torch.tensor(tokens[None]), output_attentions=True).attentions
    head, mean = scores.patterns(random_gpt2, tokens, [(2, 1), (1, None)])
    assert head == pytest.approx(attentions[2][0, 1].numpy(), abs=1e-6)
    assert mean == pytest.approx(attentions[1][0].mean(0).numpy(), abs=1e-6)


def test_a_row_without_repeats_has_no_prefix_matching_score(random_gpt2):
    batch = TokenBatch.of([np.array([random_gpt2.bos, 1, 2, 3])], pad=0)
    assert np.isnan(scores.score(random_gpt2, batch, batch_size=1).mean("prefix_matching")).all()


def test_no_hook_is_left_behind(random_gpt2):
    drawn = battery(random_gpt2.ordinary(), random_gpt2.bos, rows=2, length=16, seed=0)
    scores.score(random_gpt2, drawn.repeats, batch_size=2)
    modules = random_gpt2.door.network.named_modules()
    assert [name for name, module in modules if module._forward_hooks or module._forward_pre_hooks] == []
    assert not any(point.fwd_hooks for point in random_gpt2.bridge.hook_dict.values())


def test_logits_are_never_computed(random_gpt2, batch):
    def refuse(*args):
        raise AssertionError("the unembedding ran")

    watch = random_gpt2.door.network.lm_head.register_forward_pre_hook(refuse)
    try:
        scores.score(random_gpt2, batch, batch_size=3)
        with pytest.raises(AssertionError, match="unembedding"):
            random_gpt2.logits(batch.tokens)
    finally:
        watch.remove()


class FakeModel:
    """A model of one layer whose heads' patterns are given, in blocks of two queries: the traps need exact heads."""

    n_layers = 1
    device = torch.device("cpu")

    def __init__(self, pattern: np.ndarray):
        self.pattern = torch.from_numpy(pattern)[None]
        self.n_heads = pattern.shape[0]

    def read(self, tokens: np.ndarray, reader) -> None:
        assert self.pattern.shape[2] == tokens.shape[1]
        reader(0, self)

    def blocks(self):
        for start in range(0, self.pattern.shape[2], 2):
            yield start, self.pattern[:, :, start : start + 2]


def fake_scores(heads: np.ndarray, row: list[int]) -> scores.HeadScores:
    """Scores of heads with the patterns `heads`, [head, query, key], on BOS and `row`."""
    return scores.score(FakeModel(heads), TokenBatch.of([np.array([0, *row])], pad=0), batch_size=1)


def looking_at(keys: list[int]) -> np.ndarray:
    """A pattern whose query i pays everything to keys[i]."""
    return np.eye(len(keys))[keys]


REPEATED = [7, 8, 9, 7, 8, 9]  # with BOS in front: the targets of queries 4, 5, 6 are 2, 3, 4


def test_a_perfect_head_scores_one():
    perfect = looking_at([0, 0, 0, 0, 2, 3, 4])[None]
    assert fake_scores(perfect, REPEATED).mean("prefix_matching").item() == 1.0


def test_looking_at_the_copy_itself_is_not_induction():
    duplicate = looking_at([0, 0, 0, 0, 1, 2, 3])[None]
    measured = fake_scores(duplicate, REPEATED)
    assert measured.mean("prefix_matching").item() == 0.0
    assert measured.mean("duplicate_token").item() == 1.0


def test_attention_to_bos_stays_in_the_denominator():
    resting = looking_at([0] * 7)
    faint = 0.99 * resting + 0.01 * looking_at([0, 0, 0, 0, 2, 3, 4])
    measured = fake_scores(np.stack([faint, resting]), REPEATED).mean("prefix_matching")[0]
    assert measured == pytest.approx([0.01, 0.0], rel=1e-12, abs=1e-12), "in 64 bits"


def test_attention_split_over_several_copies_still_counts_in_full():
    pattern = looking_at([0, 0, 0, 2, 3, 2, 2])
    pattern[5] = [0, 0, 0.5, 0, 0.5, 0, 0]  # two targets, half of the attention each
    measured = fake_scores(pattern[None], [7, 8, 7, 8, 7, 1])
    assert measured.mean("prefix_matching")[0, 0] == pytest.approx(1.0)


def test_scores_cannot_be_changed_by_hand():
    with pytest.raises(FrozenInstanceError):
        scores.HeadScores({}).sums = {}
