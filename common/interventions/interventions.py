"""The interventions: take a part of a circuit away and see what happens. Each returns an `Intervention` to apply.

| intervention | what changes | what stays |
|---|---|---|
| zero, mean, resample, output_from | the head's output before W_O | its pattern, all other heads |
| uniform, pattern_from, forbid | the pattern | the values |
| input_from "q", "k" | the query or the key, attention recomputed | the other two |
| input_from "v" | the values | the pattern |
| path | what one head's query, key or values read of another head's output | everything else |
| without_source | the same, with the scale of the receiver's LayerNorm frozen | everything else |

Zero ablation also deletes the constant part of what a head writes; mean and resample keep it (Zhang & Nanda 2023, arXiv
2309.16042). Of queries, keys and values, the first two decide where a head looks and the last what it brings back.

`path` is direct path patching (Wang et al. 2022, arXiv 2211.00593; Goldowsky-Dill et al. 2023, arXiv 2304.05969):

1. run clean, and take the sender's output as the intervention on the sender leaves it;
2. put sender's new minus clean output, through W_O, into the residual stream that the receiver's layer reads;
3. recompute its LayerNorm and the receiver's own query, key or values from that; MLPs and heads in between, the other
   heads of that layer and the receiver's other two inputs stay as they are. With `through_mlps` the MLPs in between,
   from that of the sender's own layer on, are recomputed one after the other and add their change to step 2; heads in
   between stay. Wang et al. count these paths as direct; they matter where an MLP re-encodes what a head wrote.

`transformer_lens.patching.get_act_patch_direct_path` does the same for a sender's output on other tokens, one number
for the whole batch, and refuses keys and values of grouped-query models. It serves as the reference in the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from common import UserError
from common.attention.head import Head as NamedHead
from common.heads.statistics import Ints
from common.heads.tokens import Cells, TokenBatch
from common.interventions.edits import (
    Change,
    Edit,
    GroupedKeyEdit,
    Head,
    Intervention,
    Recordings,
    Run,
    ValueEdit,
    has_lone_mlp,
    hook_name,
    mlp_output,
)

PARTS = {"q": "query", "k": "key", "v": "values"}

# --- a head's output ---


def zero(heads: Sequence[Head]) -> Intervention:
    """The heads write nothing (but what the layer's output bias adds)."""
    return _edits("zero", heads, "z", lambda layer, head: lambda old, run: torch.zeros_like(old))


def output_from(heads: Sequence[Head], source: Recordings) -> Intervention:
    """The heads put out what they put out in `source`, row by row: activation patching of their output."""
    source.fetch({(layer, "z") for layer, _ in heads})

    def change(layer: int, head: int) -> Change:
        output = source.get(layer, "z")[:, :, head]
        return lambda old, run: output[run.rows].to(old)

    return _edits("output", heads, "z", change)


def mean(heads: Sequence[Head], reference: Recordings, reference_classes: Ints, classes: Ints) -> Intervention:
    """Each head's output is its mean over the reference rows' positions of the same class.

    `reference_classes` and `classes`: [rows, pos] of the reference rows and of the rows to run, such as
    `position_classes` gives; negative where there is nothing to average. Raises UserError for a class without a
    reference.
    """
    missing = set(classes[classes >= 0].tolist()) - set(reference_classes.ravel().tolist())
    if missing:
        raise UserError(f"mean ablation: the reference rows have no position of class {sorted(missing)[0]}")
    reference.fetch({(layer, "z") for layer, _ in heads})
    places = torch.from_numpy(np.maximum(classes, 0))

    def change(layer: int, head: int) -> Change:
        table = _class_means(reference.get(layer, "z")[:, :, head], reference_classes)
        return lambda old, run: table[places[run.rows].to(old.device)].to(old)

    return _edits("mean", heads, "z", change)


def _class_means(output: torch.Tensor, classes: Ints) -> torch.Tensor:
    """Mean of `output` [rows, pos, d_head] over the places of each class, [classes, d_head]; 0 for a class unseen."""
    used = torch.from_numpy(classes >= 0).to(output.device)
    place = torch.from_numpy(classes).to(output.device)[used]
    sums = torch.zeros(int(classes.max()) + 1, output.shape[-1], dtype=torch.float64, device=output.device)
    sums.index_add_(0, place, output[used].double())
    counts = torch.bincount(place, minlength=len(sums)).clamp_min(1)
    return sums / counts[:, None]


def position_classes(batch: TokenBatch) -> Ints:
    """[rows, pos]: 0 BOS, 1 a query without a target, 2 a query with one, -1 padding."""
    classes = np.ones(batch.tokens.shape, dtype=np.int64)
    cells = batch.cells["prefix_matching"]
    classes[cells.row, cells.query] = 2
    classes[:, 0] = 0
    classes[np.arange(batch.tokens.shape[1]) >= batch.lengths[:, None]] = -1
    return classes


def resample(heads: Sequence[Head], control: Recordings, *, seed: int) -> Intervention:
    """Each head's output is that of a control row, another one than the row's own; the same for all heads.

    Raises UserError for fewer than two rows.
    """
    control.fetch({(layer, "z") for layer, _ in heads})
    donors = torch.from_numpy(donor_rows(len(control.tokens), seed))

    def change(layer: int, head: int) -> Change:
        output = control.get(layer, "z")[:, :, head]
        return lambda old, run: output[donors[run.rows]].to(old)

    return _edits("resample", heads, "z", change)


def donor_rows(rows: int, seed: int) -> Ints:
    """For each of `rows` another row, every row once: a random cycle through all of them."""
    if rows < 2:
        raise UserError("resampling needs at least two rows: no row may get its own")
    cycle = np.random.default_rng(seed).permutation(rows)
    donors = np.empty(rows, dtype=np.int64)
    donors[cycle] = np.roll(cycle, 1)
    return donors


# --- the pattern alone ---


def uniform(heads: Sequence[Head]) -> Intervention:
    """Attention is the same to every position up to the query (a sliding window is not regarded)."""

    def change(pattern: torch.Tensor, run: Run) -> torch.Tensor:
        seen = torch.ones_like(pattern[0]).tril()
        return (seen / seen.sum(-1, keepdim=True)).expand_as(pattern)

    return _edits("uniform pattern", heads, "pattern", lambda layer, head: change)


def pattern_from(heads: Sequence[Head], source: Recordings) -> Intervention:
    """The pattern that the heads have in `source`: the control rows', or another run's, which freezes it."""
    source.fetch({(layer, "pattern") for layer, _ in heads})

    def change(layer: int, head: int) -> Change:
        pattern = source.get(layer, "pattern")[:, head]
        return lambda old, run: pattern[run.rows]

    return _edits("pattern", heads, "pattern", change)


def forbid(heads: Sequence[Head], cells: Cells) -> Intervention:
    """Attention to the `cells` is taken away and the query's row renormalised; a row left empty stays empty."""
    row, query, key = (torch.from_numpy(index) for index in (cells.row, cells.query, cells.key))

    def change(pattern: torch.Tensor, run: Run) -> torch.Tensor:
        start = run.rows.start or 0
        inside = (row >= start) & (row < start + len(pattern))
        return without_cells(pattern, row[inside] - start, query[inside], key[inside])

    return _edits("forbid", heads, "pattern", lambda layer, head: change)


def without_cells(pattern: torch.Tensor, row: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """A pattern [rows, query, key], or [rows, query, key, heads], with those cells at 0, and its rows summing to 1."""
    left = pattern.clone()
    left[row, query, key] = 0.0
    total = left.sum(2, keepdim=True)
    return torch.where(total > 0, left / total.clamp_min(torch.finfo(left.dtype).tiny), left)


# --- query, key or values alone ---


def input_from(heads: Sequence[Head], part: str, clean: Recordings, source: Recordings) -> Intervention:
    """The heads' query ("q"), key ("k") or values ("v") are those of `source`; the other two stay.

    Attention is recomputed for a new query or key, and kept for new values. Where query heads share a key, only the
    named heads see the new one: their pattern comes from a run of the `clean` rows in which the shared key alone is
    replaced. A row's own control row differs from it only from the second segment on: it changes the queries of
    repeats, but neither the keys nor the values of their targets, in the first segment. Take those from another row
    (`donor_rows`).
    """
    source.fetch({(layer, part) for layer, _ in heads})

    def change(layer: int, head: int, column: int) -> Change:
        recorded = source.get(layer, part)[:, :, column]
        return lambda old, run: recorded[run.rows].to(old)

    return _inputs(f"{PARTS[part]} alone", heads, part, clean, change)


def path(
    senders: Intervention, receivers: Sequence[Head], part: str, clean: Recordings, *, through_mlps: bool = False
) -> Intervention:
    """The receivers' query, key or values alone read the senders' output as the intervention `senders` leaves it.

    Each sender's output is taken with everything else clean; what several senders change is added up. See the module's
    docstring for the steps. `through_mlps`: MLPs between sender and receiver are recomputed, not kept. Raises UserError
    for a receiver no later than a sender, a model whose heads' outputs do not reach the residual stream as they are, or
    through MLPs, one whose MLPs do not read the stream after attention (parallel blocks) or do not write into it as
    they are.
    """
    _check_order(senders.heads, receivers)
    changes = _changes(senders, clean)
    arriving = {layer: _arriving(clean, changes, layer, through_mlps) for layer, _ in receivers}

    def moved(layer: int, head: int, column: int) -> Change:
        resid = clean.get(layer, "resid_pre")
        before, after = (project(clean, layer, part, column, stream) for stream in (resid, resid + arriving[layer]))
        check_same(
            before, clean.get(layer, part)[:, :, column], f"layer {layer} does not read the residual stream alone"
        )
        return lambda old, run: old + (after - before)[run.rows]

    way = " through MLPs" if through_mlps else ""
    return _inputs(f"{senders.name} {_names(senders.heads)} → {PARTS[part]}{way}", receivers, part, clean, moved)


def paths_into(
    receiver: Head,
    part: str,
    intervene: Callable[[Sequence[Head]], Intervention],
    clean: Recordings,
    *,
    through_mlps: bool = False,
) -> list[Intervention]:
    """The path of every earlier head, alone, into the receiver's query, key or values; `intervene` ablates a sender."""
    layers = range(receiver[0])
    clean.fetch({(layer, point) for layer in layers for point in ("z", "o", "attn_out", "resid_pre", "resid_post")})
    senders = [(layer, head) for layer in layers for head in range(clean.model.n_heads)]
    return [path(intervene([sender]), [receiver], part, clean, through_mlps=through_mlps) for sender in senders]


def _changes(senders: Intervention, clean: Recordings) -> dict[int, torch.Tensor]:
    """By layer, what the senders write there under their edits less what they write clean, [rows, pos, d_model]."""
    changes: dict[int, torch.Tensor] = {}
    for head in senders.heads:
        move = written(clean, head, _patched_output(clean, senders, head) - _output(clean, head))
        changes[head[0]] = changes[head[0]] + move if head[0] in changes else move
    return changes


def _arriving(clean: Recordings, changes: dict[int, torch.Tensor], layer: int, through_mlps: bool) -> torch.Tensor:
    """How the residual stream that `layer` reads differs, [rows, pos, d_model], when heads of earlier layers change
    what they write as `changes` says, other heads write what they write clean, and MLPs too or what they then make."""
    difference = torch.zeros_like(clean.get(layer, "resid_pre"))
    for at in range(min(changes), layer):
        difference = difference + changes.get(at, 0.0)
        if through_mlps:
            difference = difference + _mlp_change(clean, at, difference)
    return difference


def _mlp_change(clean: Recordings, layer: int, difference: torch.Tensor) -> torch.Tensor:
    """What the MLP of `layer` adds to the residual stream more, [rows, pos, d_model], when the stream after the layer's
    attention has `difference` more in it.

    Raises UserError where the MLP does not read that stream, or something stands between it and the stream.
    """
    block = clean.model.bridge.blocks[layer]
    complaint = f"the MLP of layer {layer} of '{clean.model.name}' does not read and write the stream after attention"
    if hook_name(layer, "resid_mid") not in clean.model.bridge.hook_dict or not has_lone_mlp(block):
        raise UserError(f"{complaint} and nothing else: paths through MLPs cannot be made on its architecture")
    clean.fetch({(layer, point) for point in ("resid_pre", "attn_out", "resid_mid", "resid_post")})
    middle, after = clean.get(layer, "resid_mid"), clean.get(layer, "resid_post")
    check_same(clean.get(layer, "resid_pre") + clean.get(layer, "attn_out"), middle, complaint)
    with torch.no_grad():
        made, changed = (mlp_output(block, stream) for stream in (middle, middle + difference))
    check_same(middle + made, after, complaint)
    return changed - made


def without_source(
    sources: Sequence[Head],
    receivers: Sequence[Head],
    part: str,
    clean: Recordings,
    *,
    through_first_mlp: bool = False,
) -> Intervention:
    """The receivers' query, key or values read the residual stream without what the source heads wrote into it.

    The scale of the receiver's LayerNorm is frozen at its clean value, so a query or key changes by exactly the linear
    term that a decomposition of the score by source gives it. `through_first_mlp`: a source of layer 0 is what that
    head wrote with what MLP 0 makes of it, as in common/qk.py. Raises UserError as `path` does.
    """
    _check_order(sources, receivers)
    lost = torch.stack([_lost(clean, head, through_first_mlp) for head in sources]).sum(0)

    def moved(layer: int, head: int, column: int) -> Change:
        term = project_frozen(clean, layer, part, column, lost)
        return lambda old, run: old - term[run.rows]

    return _inputs(f"{PARTS[part]} without {_names(sources)}", receivers, part, clean, moved)


def _lost(clean: Recordings, head: Head, through_first_mlp: bool) -> torch.Tensor:
    """What the residual stream holds of a source head, [rows, pos, d_model]."""
    direct = written(clean, head, _output(clean, head))
    if head[0] > 0 or not through_first_mlp:
        return direct
    silenced = Recordings(clean.model, clean.tokens, batch_size=clean.batch_size, under=zero([head]))
    return clean.get(1, "resid_pre") - silenced.get(1, "resid_pre")


def project(clean: Recordings, layer: int, part: str, column: int, stream: torch.Tensor) -> torch.Tensor:
    """The query, key or values [rows, pos, d_head] of one column of heads, from a residual stream [rows, pos, d_model]
    through the layer's own LayerNorm."""
    block = clean.model.bridge.blocks[layer]
    with torch.no_grad():
        return _column(clean, layer, part, column, block.ln1.original_component(stream))


def project_frozen(clean: Recordings, layer: int, part: str, column: int, term: torch.Tensor) -> torch.Tensor:
    """What one term of the residual stream [rows, pos, d_model] adds to a query, key or values [rows, pos, d_head],
    with the scale of LayerNorm as in the clean run: linear in the term, no bias."""
    norm = clean.model.bridge.blocks[layer].ln1
    weight = 1.0 + norm.weight if norm.uses_weight_offset else norm.weight
    with torch.no_grad():
        centred = term if norm.uses_rms_norm else term - term.mean(-1, keepdim=True)
        read = centred / clean.get(layer, "scale") * weight
        return _column(clean, layer, part, column, read) - _column(clean, layer, part, column, torch.zeros_like(read))


def _column(clean: Recordings, layer: int, part: str, column: int, read: torch.Tensor) -> torch.Tensor:
    """One head's columns of a projection of what the attention layer reads."""
    linear = getattr(clean.model.bridge.blocks[layer].attn, part).original_component
    columns = clean.get(layer, part).shape[2]
    return linear(read).unflatten(-1, (columns, -1))[:, :, column]


def _output(clean: Recordings, head: Head) -> torch.Tensor:
    return clean.get(head[0], "z")[:, :, head[1]]


def _patched_output(clean: Recordings, change: Intervention, head: Head) -> torch.Tensor:
    """What a head puts out, [rows, pos, d_head], under the edits of `change` that are its own."""
    own, layer = change.of(head), head[0]
    if not own.at_outputs(layer):
        under = Recordings(clean.model, clean.tokens, batch_size=clean.batch_size, under=own)
        return under.get(layer, "z")[:, :, head[1]]
    output = clean.get(layer, "z").clone()
    for edit in own.edits:  # needs no run: the edits change the clean output itself
        edit.write(output, Run(slice(None)))
    return output[:, :, head[1]]


def written(clean: Recordings, head: Head, output: torch.Tensor) -> torch.Tensor:
    """What `output` [rows, pos, d_head] of a head adds to the residual stream, [rows, pos, d_model].

    Raises UserError where something stands between W_O and the residual stream.
    """
    layer, column = head
    before, after = clean.get(layer, "o"), clean.get(layer, "attn_out")
    check_same(before, after, f"'{clean.model.name}' changes what layer {layer}'s heads write before it is added")
    with torch.no_grad():
        return output @ clean.model.bridge.blocks[layer].attn.W_O[column]


def check_same(one: torch.Tensor, other: torch.Tensor, complaint: str) -> None:
    """Raise UserError with the complaint unless both are the same up to rounding."""
    scale = other.abs().max().item() + 1e-6
    tolerance = 1e-4 if one.dtype == torch.float32 else 3e-2
    if (one - other).abs().max().item() > tolerance * scale:
        raise UserError(f"{complaint}: this intervention cannot be made on its architecture")


def check_values(clean: Recordings, head: Head) -> tuple[torch.Tensor, torch.Tensor]:
    """The head's pattern [rows, query, key] and values [rows, pos, d_head], whose product must be its output.

    Raises UserError where it is not (an output gate, for one).
    """
    layer, query_head = head
    clean.fetch({(layer, point) for point in ("pattern", "v", "z")})
    pattern, values = clean.get(layer, "pattern")[:, query_head], clean.get(layer, "v")
    values = values[:, :, query_head * values.shape[2] // clean.model.n_heads]
    complaint = f"head {NamedHead.at(*head)} does not put out the values it attends to"
    check_same(pattern @ values, clean.get(layer, "z")[:, :, query_head], complaint)
    return pattern, values


def _check_order(senders: Sequence[Head], receivers: Sequence[Head]) -> None:
    for sender in senders:
        for receiver in receivers:
            if sender[0] >= receiver[0]:
                raise UserError(
                    f"head {NamedHead.at(*receiver)} reads nothing of head {NamedHead.at(*sender)}: the sender's layer "
                    "must come before the receiver's"
                )


# --- shared ---


def _edits(name: str, heads: Sequence[Head], point: str, change: Callable[[int, int], Change]) -> Intervention:
    """The same kind of edit at `point` for every head."""
    edits = tuple(Edit(layer, point, head, change(layer, head)) for layer, head in heads)
    return Intervention(name, tuple(heads), edits)


def _inputs(
    name: str, heads: Sequence[Head], part: str, clean: Recordings, change: Callable[[int, int, int], Change]
) -> Intervention:
    """An edit of every head's query, key or values; `change` takes layer, query head and the column it reads."""
    clean.fetch({(layer, part) for layer, _ in heads})
    n_heads = clean.model.n_heads

    def edit(layer: int, head: int) -> Edit:
        columns = clean.get(layer, part).shape[2]
        column = head * columns // n_heads
        new = change(layer, head, column)
        if part == "v":
            check_values(clean, (layer, head))
            return ValueEdit(layer, "z", head, new, group=column)
        if columns == n_heads:
            return Edit(layer, part, head, new)
        return GroupedKeyEdit(layer, part, head, new, group=column, clean=clean)

    return Intervention(name, tuple(heads), tuple(edit(layer, head) for layer, head in heads))


def _names(heads: Sequence[Head]) -> str:
    return " ".join(str(NamedHead.at(*head)) for head in heads)
