"""What one head reads of another: paths between heads, cut one at a time.

`path` is direct path patching (Wang et al. 2022, arXiv 2211.00593; Goldowsky-Dill et al. 2023, arXiv 2304.05969):

1. run clean, and take the sender's output as the intervention on the sender leaves it;
2. put sender's new minus clean output, through W_O, into the residual stream that the receiver's layer reads;
3. run the receiver's layer on that stream as far as its queries, keys and values, and give the receiver its own query,
   key or values of them; MLPs and heads in between, the other heads of that layer and the receiver's other two inputs
   stay as they are. With `through_mlps` the MLPs in between, from that of the sender's own layer on, are recomputed one
   after the other and add their change to step 2; heads in between stay. Wang et al. count these paths as direct; they
   matter where an MLP re-encodes what a head wrote.

`without_source` is the same with the scale of the receiver's norm frozen, which makes it linear: a score changes by
exactly the term that the decomposition (common/circuits/decomposition.py) gives the source.

The tests hold it against `transformer_lens.patching.get_act_patch_direct_path`, which patches from other tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor

from common import UserError
from common.attention.head import Head
from common.heads.attribution import check_same, check_written
from common.interventions.edits import INPUTS, Change, Intervention, Recordings, each_head, zero
from common.loading.families import UNCHANGED, plain


def path(
    senders: Intervention, receivers: Sequence[Head], part: str, clean: Recordings, *, through_mlps: bool = False
) -> Intervention:
    """The receivers' query ("q"), key ("k") or values ("v") alone read the senders' output as the intervention
    `senders` leaves it.

    Each sender's output is taken with everything else clean; what several senders change is added up. Raises UserError
    for a receiver no later than a sender, a model whose head outputs do not reach the residual stream as they are, or
    through MLPs, one whose MLPs do not read the stream after attention (parallel blocks) or write into it as they are.
    """
    changes: dict[int, Tensor] = {}  # by layer, how far what the senders write there moves, [rows, pos, d_model]
    for head in senders.heads:
        layer, own = head.layer, senders.of(head).edits
        changed = clean.run({(layer, "z")}, own, clean.get(layer, "resid_pre"))[layer, "z"]
        move = (changed - clean.get(layer, "z"))[:, :, head.head]
        changes[layer] = changes.get(layer, 0.0) + _through_projection(clean, head, move)

    def read_by(layer: int) -> Tensor:
        stream = clean.get(layer, "resid_pre")
        difference = torch.zeros_like(stream)
        for below in range(min(changes), layer):
            difference = difference + changes.get(below, 0.0)
            if through_mlps:
                difference = difference + _mlp_change(clean, below, difference)
        return clean.run({(layer, part)}, (), stream + difference)[layer, part]

    way = " through MLPs" if through_mlps else ""
    name = f"{senders.name} {' '.join(map(str, senders.heads))} → {INPUTS[part]}{way}"
    return _given(name, senders.heads, receivers, part, clean, read_by)


def without_source(
    sources: Sequence[Head], receivers: Sequence[Head], part: str, clean: Recordings, *, through_first_mlp: bool = False
) -> Intervention:
    """The receivers' query, key or values read the residual stream without what the source heads wrote into it.

    The scale of the receiver's norm is frozen at its clean value, so a query or key changes by exactly the linear term
    that a decomposition of the score by source gives it. `through_first_mlp`: a source of layer 0 is what that head
    wrote with what MLP 0 makes of it, as in the decomposition. Raises UserError as `path` does.
    """

    def written_by(head: Head) -> Tensor:
        # Refuses models with a norm behind their heads: silencing one head moves the others through it, and what is
        # lost would not be the part that the decomposition counts.
        direct = _through_projection(clean, head, clean.get(head.layer, "z")[:, :, head.head])
        if head.layer > 0 or not through_first_mlp:
            return direct
        silenced = Recordings(clean.model, clean.tokens, batch_size=clean.batch_size, under=zero([head]))
        return clean.get(1, "resid_pre") - silenced.get(1, "resid_pre")

    lost = torch.stack([written_by(head) for head in sources]).sum(0)

    def read_by(layer: int) -> Tensor:
        parts, stream = clean.model.parts.layers[layer], clean.get(layer, "resid_pre")
        norm = parts.norm or UNCHANGED
        term = torch.from_numpy(norm.linear(plain(lost)) / norm.scale(plain(stream))).to(stream)
        # The norm's own output less the part of it that is linear in what is lost: the scale has not moved.
        module, side = (parts.attention_in, "output") if parts.attention_in else (parts.attention, "input")
        return clean.run({(layer, part)}, (), stream, (module, side, -term))[layer, part]

    name = f"{INPUTS[part]} without {' '.join(map(str, sources))}"
    return _given(name, sources, receivers, part, clean, read_by)


def _given(
    name: str, senders: Sequence[Head], receivers: Sequence[Head], part: str, clean: Recordings,
    read_by: Callable[[int], Tensor],
) -> Intervention:  # fmt: skip
    """Give the receivers the query, key or values [rows, pos, head, d_head] that their layer has now `read_by` it."""
    for sender, receiver in product(senders, receivers):
        if sender.layer >= receiver.layer:
            why = "the sender's layer must come before the receiver's"
            raise UserError(f"head {receiver} reads nothing of head {sender}: {why}")
    new = {layer: read_by(layer) for layer in {head.layer for head in receivers}}

    def change(head: Head) -> Change:
        # How far the new input lies from the clean one is added: other edits of the run keep their effect.
        move = (new[head.layer] - clean.get(head.layer, part))[:, :, head.head]
        return lambda old, rows: old + move[rows]

    return each_head(name, receivers, part, change)


def _mlp_change(clean: Recordings, layer: int, difference: Tensor) -> Tensor:
    """What the MLP of `layer` adds to the residual stream more, [rows, pos, d_model], when the stream after the layer's
    attention has `difference` more in it. Raises UserError where it does not read and write that stream as it is."""
    parts = clean.model.parts.layers[layer]
    complaint = f"the MLP of layer {layer} of '{clean.model.name}' does not read and write the stream after attention"
    if not parts.has_lone_mlp:
        raise UserError(f"{complaint} and nothing else: paths through MLPs cannot be made on its architecture")
    clean.fetch({(layer, point) for point in ("resid_pre", "attn_out", "resid_mid", "resid_post")})
    middle, after = clean.get(layer, "resid_mid"), clean.get(layer, "resid_post")
    check_same(clean.get(layer, "resid_pre") + clean.get(layer, "attn_out"), middle, complaint)
    with torch.no_grad():
        made, changed = (parts.mlp_of(stream) for stream in (middle, middle + difference))
    check_same(middle + made, after, complaint)
    return changed - made


def _through_projection(clean: Recordings, head: Head, output: Tensor) -> Tensor:
    """What `output` [rows, pos, d_head] of a head adds to the residual stream, [rows, pos, d_model]."""
    projected, attn_out = (clean.get(head.layer, point) for point in ("projected", "attn_out"))
    check_written(clean.model, head.layer, projected, attn_out)
    with torch.no_grad():
        return output @ clean.model.parts.layers[head.layer].weights.W_O[head.head]
