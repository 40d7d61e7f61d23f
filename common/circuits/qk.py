"""How the queries and keys of one layer meet, in maps that are checked against the model's own attention.

1. Read q and k where they are complete: after bias, query-key norm and rotation; repeat the keys of grouped-query
   models to the query heads (query head h reads key head h // group).
2. Score every cell: scale · q·k, then the soft-cap, then the position bias (ALiBi); the pattern is the softmax over
   the keys that the layer's own mask (causal, sliding window) leaves visible.
3. Self-check: compare these scores with `hook_attn_scores` and the pattern with `hook_pattern`. A map that does not
   reproduce the model is refused, with the cell that differs most.
4. Decompose: with the scale of every norm frozen at the value it has in this run, q and k of a head are sums over
   what each part of the model wrote into the residual stream (Elhage et al. 2021, "A Mathematical Framework for
   Transformer Circuits"), so a score is a sum over query source × key source. Softmax ignores a constant added to a
   row, so the terms are also given relative to the other keys that the query could have looked at.

Arrays are float64 NumPy arrays on the CPU, whatever the model computes in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import einsum
from numpy.typing import NDArray
from safetensors.numpy import save_file

from common import UserError
from common.attention.head import Head
from common.heads.statistics import Floats, Ints
from common.loading.models import Model, watch

Bools = NDArray[np.bool_]

SCORE_ERROR = 1e-4  # largest error of a score or pattern in float32
SCORE_ERROR_16_BIT = 2e-2  # the same in float16 and bfloat16
ROUNDINGS = 8  # roundings of its own precision that the model may make in a sum of products, where that is more
SUM_ERROR = 1e-4  # largest relative error of a decomposition in float32
SUM_ERROR_16_BIT = 5e-2  # the same in float16 and bfloat16, which round the residual stream after every layer
FALLBACK_CELLS = 3  # cells decomposed on a row that has no induction cell
CONTEXTS = 32  # rows over which the mean output of MLP 0 is taken


# --- maps ---


@dataclass(frozen=True)
class Rules:
    """What a layer does to q·k on its way to the pattern.

    `scale` multiplies the product; `softcap` c, where there is one, makes c·tanh(x / c) of it; `bias`
    [batch, head, 1, key] is then added; `visible` [batch, query, key] says which keys a query may see. `rotation` is
    (cos, sin), each [pos, rotated dimensions], where positions enter by rotation.
    """

    scale: float
    softcap: float | None
    bias: Floats | None
    visible: Bools
    rotation: tuple[Floats, Floats] | None

    def scores(self, products: Floats) -> Floats:
        """What softmax gets, from scaled products [batch, head, query, key]."""
        capped = products if self.softcap is None else self.softcap * np.tanh(products / self.softcap)
        return capped if self.bias is None else capped + self.bias

    def pattern(self, scores: Floats) -> Floats:
        """Softmax over the visible keys of each query; 0 elsewhere."""
        seen = np.where(self.visible[:, None], scores, -np.inf)
        weight = np.exp(seen - seen.max(-1, keepdims=True))
        return weight / weight.sum(-1, keepdims=True)


@dataclass(frozen=True)
class Check:
    """Largest absolute errors against the model. `scores` is None where the model shows no scores before softmax."""

    scores: float | None
    pattern: float

    @property
    def max_abs_error(self) -> float:
        return max(self.scores or 0.0, self.pattern)


@dataclass(frozen=True)
class Interaction:
    """Queries and keys of a layer, and how they meet.

    `q`, `k`: [batch, pos, head, d_head], after bias, norm and rotation, keys repeated to the query heads;
    `products`: [batch, head, query, key], scale · q·k; `scores`: the same after soft-cap and position bias, as softmax
    gets them (cells that a query may not see hold a number too: mask them with `rules.visible`); `pattern`: after
    softmax.
    """

    layer: int
    q: Floats
    k: Floats
    products: Floats
    scores: Floats
    pattern: Floats
    rules: Rules
    check: Check


def interact(model: Model, tokens: Ints, layer: int) -> Interaction:
    """Read q and k of `layer` on [batch, pos] token ids, let them meet, and check the maps against the model.

    Raises UserError where the layer does not exist or has no attention, and where scores or pattern differ from the
    model's by more than 1e-4 (float32; 2e-2 in 16 bits), or by more than the rounding of the model's own sums.
    """
    attention = attention_of(model, layer)
    seen, given = _see(model, tokens, layer)
    rules = _rules(attention, seen, given, tokens.shape)
    q, k = _meeting(seen, rules, model.n_heads)
    products = rules.scale * dot_products(q, k)
    scores = rules.scores(products)
    pattern = rules.pattern(scores)
    allowed = _allowed(q, k, rules.scale, precision(model))
    check = _checked(model, layer, (scores, pattern), seen, rules.visible, allowed)
    return Interaction(layer, q, k, products, scores, pattern, rules, check)


def export(interaction: Interaction, tokens: Ints, path: Path) -> None:
    """Write q and k [pos, head, d_head] (float32) and the ids [pos] of one row to a safetensors file."""
    arrays = {"q": interaction.q[0].astype(np.float32), "k": interaction.k[0].astype(np.float32), "tokens": tokens}
    save_file(
        {key: np.ascontiguousarray(value) for key, value in arrays.items()}, path, {"layer": str(interaction.layer)}
    )


def check_exists(model: Model, layer: int | None, head: int | None) -> None:
    """Raise UserError for a layer without attention or a layer or head that the model has not; None is any."""
    if layer is not None:
        attention_of(model, layer)
    if head is not None and head >= model.n_heads:
        raise UserError(f"{model.name} has no head {head} in a layer: its heads are 0 to {model.n_heads - 1}")


def attention_of(model: Model, layer: int) -> Any:
    """The attention module of `layer`; UserError where there is no such layer or it has no attention."""
    if not 0 <= layer < model.n_layers:
        raise UserError(f"{model.name} has no layer {layer}: its layers are 0 to {model.n_layers - 1}")
    having = [index for index, block in enumerate(model.bridge.blocks) if hasattr(block, "attn")]
    if layer not in having:
        raise UserError(f"layer {layer} of {model.name} has no attention; those that have: {having or 'none'}")
    return model.bridge.blocks[layer].attn


def precision(model: Model) -> torch.dtype:
    """What the model computes in."""
    return next(model.bridge.original_model.parameters()).dtype


def dot_products(q: Floats, k: Floats) -> Floats:
    """[batch, head, query, key] from q and k [batch, pos, head, d_head]: every query with every key, head by head."""
    pattern = "batch query head d_head, batch key head d_head -> batch head query key"
    return einsum(torch.from_numpy(q), torch.from_numpy(k), pattern).numpy()


def rotate(vectors: Floats, cos: Floats, sin: Floats) -> Floats:
    """Rotary positions (Su et al. 2021, arXiv 2104.09864), first half against second half of the rotated dimensions.

    `vectors`: [..., pos, d_head]; `cos`, `sin`: [pos, rotated], rotated <= d_head; the other dimensions stay.
    """
    turned, kept = vectors[..., : cos.shape[-1]], vectors[..., cos.shape[-1] :]
    first, second = np.split(turned, 2, axis=-1)
    across = np.concatenate([-second, first], axis=-1)
    return np.concatenate([turned * cos + across * sin, kept], axis=-1)


def repeat_keys(k: Floats, n_heads: int) -> Floats:
    """Keys [batch, pos, key head, d_head] for each query head: query head h reads key head h // group."""
    return np.repeat(k, n_heads // k.shape[2], axis=2)


_HOOKS = ("hook_q", "hook_k", "hook_rot_q", "hook_rot_k", "hook_cos", "hook_sin", "hook_attn_scores", "hook_pattern")


def _see(model: Model, tokens: Ints, layer: int) -> tuple[dict[str, Floats], dict[str, Any]]:
    """What the layer's hook points show, by hook name, and the keyword arguments that its attention is called with."""
    seen: dict[str, Floats] = {}
    given: dict[str, Any] = {}
    prefix = f"blocks.{layer}.attn."

    def keep(hook_name: str) -> Any:
        return lambda value, hook: seen.__setitem__(hook_name, plain(value))

    handle = attention_of(model, layer).register_forward_pre_hook(
        lambda module, args, kwargs: given.update(kwargs), with_kwargs=True
    )
    hooks = [
        (prefix + hook_name, keep(hook_name)) for hook_name in _HOOKS if prefix + hook_name in model.bridge.hook_dict
    ]
    try:
        watch(model, tokens, hooks, until=f"blocks.{layer}.hook_resid_post")
    finally:
        handle.remove()
    missing = [hook_name for hook_name in ("hook_q", "hook_k", "hook_pattern") if hook_name not in seen]
    if missing:
        raise UserError(f"layer {layer} of {model.name} does not show its {' and '.join(missing)}: nothing to draw")
    return seen, given


def plain(value: torch.Tensor) -> Floats:
    """A tensor as a float64 array on the CPU."""
    return value.detach().cpu().double().numpy()


def _rules(attention: Any, seen: dict[str, Floats], given: dict[str, Any], shape: tuple[int, ...]) -> Rules:
    """The layer's scale, cap, position bias, mask and rotation, from the wrapped module and what it was called with."""
    module = attention.original_component
    rotation = (seen["hook_cos"][0], seen["hook_sin"][0]) if "hook_cos" in seen else None
    return Rules(
        scale=_scale(module, seen["hook_q"].shape[-1]),
        softcap=getattr(module, "attn_logit_softcapping", None),
        bias=_position_bias(given, *shape),
        visible=_visible(given.get("attention_mask"), *shape),
        rotation=rotation,
    )


def _scale(module: Any, d_head: int) -> float:
    """What the module multiplies q·k with: what it says, else 1 / sqrt(d_head)."""
    return float(getattr(module, "scaling", d_head**-0.5))


def _position_bias(given: dict[str, Any], batch: int, pos: int) -> Floats | None:
    """ALiBi [batch, head, 1, key] (Press et al. 2021, arXiv 2108.12409), where the attention is given one."""
    alibi = given.get("alibi")
    return None if alibi is None else plain(alibi).reshape(batch, -1, 1, pos)


def _visible(mask: torch.Tensor | None, batch: int, pos: int) -> Bools:
    """[batch, query, key] from the mask [batch, 1, query, key] that is added to the scores; causal without one."""
    if mask is None:
        return np.broadcast_to(np.tril(np.ones((pos, pos), dtype=bool)), (batch, pos, pos))
    return np.broadcast_to(plain(mask)[:, 0, :, :pos] > -1e4, (batch, pos, pos))


def _meeting(seen: dict[str, Floats], rules: Rules, n_heads: int) -> tuple[Floats, Floats]:
    """q and k as they meet: [batch, pos, head, d_head], rotated, keys repeated to the query heads.

    `hook_q` and `hook_k` come before rotation; where the model shows them after it, those are read.
    """
    q, k = seen.get("hook_rot_q", seen["hook_q"]), seen.get("hook_rot_k", seen["hook_k"])
    if rules.rotation is not None and "hook_rot_q" not in seen:
        q, k = (rotate(part.swapaxes(1, 2), *rules.rotation).swapaxes(1, 2) for part in (q, k))
    return q, repeat_keys(k, n_heads)


def _allowed(q: Floats, k: Floats, scale: float, dtype: torch.dtype) -> float:
    """The error to allow: a fixed one, or that of the model's own sums of products where those are very large."""
    floor = SCORE_ERROR if dtype in (torch.float32, torch.float64) else SCORE_ERROR_16_BIT
    largest = float(scale * dot_products(np.abs(q), np.abs(k)).max())
    return max(floor, ROUNDINGS * torch.finfo(dtype).eps * largest)


def _checked(
    model: Model, layer: int, ours: tuple[Floats, Floats], seen: dict[str, Floats], visible: Bools, allowed: float
) -> Check:
    """Compare our (scores, pattern) with the model's; UserError with the worst cell where they differ."""
    pattern = _largest_error(model, layer, "pattern", ours[1], seen["hook_pattern"], visible, allowed)
    theirs = seen.get("hook_attn_scores")
    if theirs is None or np.array_equal(theirs, seen["hook_pattern"]):  # some wrappers fire both with the pattern
        return Check(None, pattern)
    return Check(_largest_error(model, layer, "score", ours[0], theirs, visible, allowed), pattern)


def _largest_error(
    model: Model, layer: int, what: str, ours: Floats, theirs: Floats, visible: Bools, allowed: float
) -> float:
    """Largest |ours - theirs| over visible cells, [batch, head, query, key]; UserError above `allowed`."""
    error = np.where(visible[:, None], np.abs(ours - theirs), 0.0)
    worst = np.unravel_index(int(np.argmax(error)), error.shape)
    if error[worst] <= allowed:
        return float(error[worst])
    _, head, query, key = (int(place) for place in worst)
    raise UserError(
        f"layer {layer} of {model.name} is not reproduced: head {Head.at(layer, head)}, query {query}, key {key} has "
        f"the {what} {theirs[worst]:.6g} in the model and {ours[worst]:.6g} by our rules (off by {error[worst]:.2g}, "
        f"allowed {allowed:.2g}); no map of it is drawn"
    )


# --- which part of the model wrote what ---


@dataclass(frozen=True)
class Norm:
    """LayerNorm or RMSNorm as a linear map once its scale is given: x -> linear(x) / scale + offset."""

    gain: Floats
    offset: Floats
    centred: bool
    eps: float

    @classmethod
    def of(cls, module: Any) -> Norm:
        """From a normalization module of the bridge."""
        component = module.original_component
        weight, bias = (getattr(component, part, None) for part in ("weight", "bias"))
        gain = np.ones(1) if weight is None else plain(weight) + (1.0 if module.uses_weight_offset else 0.0)
        offset = np.zeros(1) if bias is None else plain(bias)
        eps = getattr(component, "eps", getattr(component, "variance_epsilon", module.config.eps))
        return cls(gain, offset, not module.uses_rms_norm, float(eps))

    def centre(self, x: Floats) -> Floats:
        return x - x.mean(-1, keepdims=True) if self.centred else x

    def scale(self, x: Floats) -> Floats:
        """[..., 1]: what the norm divides x [..., d] by."""
        return np.sqrt((self.centre(x) ** 2).mean(-1, keepdims=True) + self.eps)

    def linear(self, x: Floats) -> Floats:
        """The part of the norm that is linear in x, before its division."""
        return self.centre(x) * self.gain


UNCHANGED = Norm(np.ones(1), np.zeros(1), centred=False, eps=0.0)


@dataclass(frozen=True)
class Reader:
    """How one head makes its query, or its key, of the residual stream: norm, weights, and a norm of its own.

    `weight`: [d_model, d_head]; `bias`: [d_head]; `norms` says whether there are norms before and after.
    """

    before: Norm | None
    weight: Floats
    bias: Floats
    after: Norm | None

    def folded(self) -> Floats:
        """[d_model, d_head]: the weights with all that is linear in the norms around them."""
        read = (self.before or UNCHANGED).linear(np.eye(len(self.weight))) @ self.weight
        return (self.after or UNCHANGED).linear(read)

    def constant(self) -> Floats:
        """[d_head]: what is read whatever the residual stream holds, before the norm of the head."""
        offset = (self.before or UNCHANGED).offset
        return np.broadcast_to(offset, len(self.weight)) @ self.weight + self.bias

    def read(self, stream: Floats) -> Floats:
        """Query or key [pos, d_head] of a residual stream [pos, d_model], before rotation."""
        before = self.before.scale(stream) if self.before else 1.0
        made = (self.before or UNCHANGED).linear(stream) @ self.weight / before + self.constant()
        return self.after.linear(made) / self.after.scale(made) + self.after.offset if self.after else made

    def read_part(self, part: Floats, typical: Floats) -> Floats:
        """What a part of the stream [pos, d_model] adds, norms at their mean scale on `typical`; no constant."""
        made = (self.before or UNCHANGED).linear(part) @ self.weight
        if self.before:
            made = made / self.before.scale(typical).mean()
        if not self.after:
            return made
        read = Reader(self.before, self.weight, self.bias, None).read(typical)
        return self.after.linear(made) / self.after.scale(read).mean()

    def read_parts(self, stream: Floats, parts: Floats) -> Floats:
        """Each part [source, pos, d_head] of the query or key, from `parts` read without division or constant.

        `parts` is `linear(written) @ weight` per source; the last source also gets every constant.
        """
        parts = parts / (self.before.scale(stream) if self.before else 1.0)
        parts[-1] += self.constant()
        if self.after:
            parts = self.after.linear(parts) / self.after.scale(parts.sum(0))
            parts[-1] += self.after.offset
        return parts


def readers(model: Model, layer: int, head: int) -> tuple[Reader, Reader]:
    """How `head` of `layer` reads its query and its key.

    Raises UserError for a query-key norm that runs over all heads at once.
    """
    attention = attention_of(model, layer)
    before = norm_before(model, layer)
    group = model.n_heads // len(attention.W_K)
    sides = (attention.W_Q, attention.b_Q, head, "q_norm"), (attention.W_K, attention.b_K, head // group, "k_norm")
    found = []
    for weights, biases, place, norm_name in sides:
        weight = plain(weights[place])
        after = Norm.of(getattr(attention, norm_name)) if hasattr(attention, norm_name) else None
        if after and after.gain.shape not in ((1,), weight.shape[1:]):
            raise UserError(f"{model.name} norms the queries of all heads at once: one head's score is no sum of parts")
        bias = np.zeros(weight.shape[1]) if biases is None else plain(biases[place])
        found.append(Reader(before, weight, bias, after))
    return found[0], found[1]


def norm_before(model: Model, layer: int) -> Norm | None:
    """The norm that the attention of `layer` reads through, if it has one."""
    block = model.bridge.blocks[layer]
    return Norm.of(block.ln1) if hasattr(block, "ln1") else None


def written(model: Model, tokens: Ints, layer: int) -> Iterator[tuple[str, Floats]]:
    """What each part of the model wrote into the residual stream that `layer` reads, on one row of ids [pos].

    Yields (source, [pos, d_model]), which sum to the stream exactly:
    `embed`, the token: its embedding (with the model's own scaling or norm of it) and, where `layer` comes after MLP 0,
    what MLP 0 makes of the token whatever its context (`mean_first_mlp`); `pos_embed`, where positions are added; per
    earlier layer its heads (`0.1`), those of layer 0 with what MLP 0 makes of them (`through_first_mlp`), and its MLP,
    `mlp0` being the rest of what MLP 0 wrote; and last `bias`, the output biases of all attention layers. Post-norms
    are frozen and shared out.
    Raises UserError where the heads of a layer do not add up to what its attention wrote.
    """
    seen = _see_stream(model, tokens[None], layer)
    token = mean_first_mlp(model, tokens) if layer else 0.0
    yield "embed", _embedding(seen)[0] + token
    if "hook_pos_embed" in seen:
        yield "pos_embed", np.broadcast_to(seen["hook_pos_embed"][0], (len(tokens), model.bridge.cfg.d_model))
    constant = np.zeros((len(tokens), model.bridge.cfg.d_model))
    for earlier in range(layer):
        heads, bias = _head_outputs(model, seen, earlier)
        mlp = _mlp_output(seen, earlier)[0]
        if earlier == 0:
            made = through_first_mlp(model, tokens)
            heads, mlp = heads + made, mlp - token - made.sum(0)
        yield from ((str(Head.at(earlier, head)), output) for head, output in enumerate(heads))
        yield f"mlp{earlier}", mlp
        constant = constant + bias
    yield "bias", constant


def mean_first_mlp(model: Model, tokens: Ints) -> Floats:
    """What MLP 0 makes of each of the ids [pos] on average over contexts, [pos, d_model].

    Later layers of many models read little of the embedding itself, because MLP 0 rewrites it. Its mean over contexts
    is the part of its output that depends on the token alone. The contexts are `CONTEXTS` rows, each a random order of
    the tokens and as many random ordinary ones behind BOS; they are the same for every run.
    """
    every, place = np.unique(tokens, return_inverse=True)
    rows = np.stack([_context(model, every[every != model.bos], row) for row in range(CONTEXTS)])
    made = _mlp_output(_see_stream(model, rows, 1), 0)
    return np.stack([made[rows == token].mean(0) for token in every])[place]


def through_first_mlp(model: Model, tokens: Ints) -> Floats:
    """What MLP 0 makes of each head of layer 0, [head, pos, d_model]: its output less its output with that head silent.

    As with the token, later layers may read a head of layer 0 in what MLP 0 made of it. These parts need not add up to
    what MLP 0 wrote; the rest is the source `mlp0`. Zero where MLP 0 does not see these heads (parallel blocks).
    """
    every = np.arange(model.n_heads)

    def silence(z: torch.Tensor, hook: Any) -> torch.Tensor:
        """Head h writes nothing in row h; the last row is left as it is."""
        z = z.clone()
        z[every, :, every] = 0.0
        return z

    rows = np.repeat(tokens[None], model.n_heads + 1, axis=0)
    made = _mlp_output(_see_stream(model, rows, 1, ("blocks.0.attn.hook_z", silence)), 0)
    return made[-1] - made[:-1]


def _context(model: Model, tokens: Ints, row: int) -> Ints:
    """BOS, then the different `tokens` and as many random ones, as far as the context reaches, in random order."""
    rng = np.random.default_rng([CONTEXTS, row])
    others = rng.choice(model.ordinary(), size=min(len(tokens), model.context - 1 - len(tokens)))
    return np.concatenate([[model.bos], rng.permutation(np.concatenate([tokens, others]))])


def _see_stream(model: Model, tokens: Ints, layer: int, *changes: tuple[str, Any]) -> dict[str, Floats]:
    """The residual stream before and within the layers up to `layer`, and what their heads read, by hook name.

    `changes`: hooks, as (hook point, function), that take effect first.
    """
    wanted = ["hook_pos_embed", f"blocks.{layer}.hook_resid_pre"]
    for index in range(layer):
        ends = ("hook_resid_pre", "hook_resid_mid", "hook_attn_out", "attn.hook_z")
        wanted += [f"blocks.{index}.{end}" for end in ends]
    seen: dict[str, Floats] = {}

    def keep(hook_name: str) -> Any:
        return lambda value, hook: seen.__setitem__(hook_name, plain(value))

    hooks = [(hook_name, keep(hook_name)) for hook_name in wanted if hook_name in model.bridge.hook_dict]
    watch(model, tokens, [*changes, *hooks], until=f"blocks.{layer}.hook_resid_pre")
    return seen


def _embedding(seen: dict[str, Floats]) -> Floats:
    """[batch, pos, d_model]: what layer 0 reads, less the positions that were added to it."""
    return seen["blocks.0.hook_resid_pre"] - seen.get("hook_pos_embed", 0.0)


def _attention_output(seen: dict[str, Floats], layer: int) -> Floats:
    """[batch, pos, d_model] that the attention of `layer` added to the residual stream."""
    block = f"blocks.{layer}."
    if block + "hook_resid_mid" in seen:
        return seen[block + "hook_resid_mid"] - seen[block + "hook_resid_pre"]
    return seen[block + "hook_attn_out"]


def _mlp_output(seen: dict[str, Floats], layer: int) -> Floats:
    """[batch, pos, d_model] that `layer` added to the residual stream besides its attention."""
    added = seen[f"blocks.{layer + 1}.hook_resid_pre"] - seen[f"blocks.{layer}.hook_resid_pre"]
    return added - _attention_output(seen, layer)


def _head_outputs(model: Model, seen: dict[str, Floats], layer: int) -> tuple[Floats, Floats]:
    """What each head of `layer` wrote, [head, pos, d_model], and its attention besides, [pos, d_model], in row 0.

    Raises UserError where the two do not add up to what the attention wrote.
    """
    attention, block = attention_of(model, layer), model.bridge.blocks[layer]
    heads = np.matmul(seen[f"blocks.{layer}.attn.hook_z"][0].swapaxes(0, 1), plain(attention.W_O))
    bias = np.zeros(heads.shape[1:]) + (0.0 if attention.b_O is None else plain(attention.b_O))
    if hasattr(block, "ln1_post"):
        post = Norm.of(block.ln1_post)
        scale = post.scale(heads.sum(0) + bias)
        heads, bias = post.linear(heads) / scale, post.linear(bias) / scale + post.offset
    output = _attention_output(seen, layer)[0]
    if np.abs(heads.sum(0) + bias - output).max() > _sum_error(model) * np.abs(output).max():
        raise UserError(f"the heads of layer {layer} of {model.name} do not add up to what its attention writes")
    return heads, bias


def _sum_error(model: Model) -> float:
    """The relative error that a sum of parts may have, by the precision that the model computes in."""
    return SUM_ERROR if precision(model) in (torch.float32, torch.float64) else SUM_ERROR_16_BIT


# --- a score as a sum ---


@dataclass(frozen=True)
class Parts:
    """q and k of one head on one row, by source, after norm and rotation: each [source, pos, d_head]."""

    sources: tuple[str, ...]
    q: Floats
    k: Floats


@dataclass(frozen=True)
class Decomposition:
    """The mean score of some cells of one head, by query source (rows) and key source (columns).

    `cells` are (query, key), `kind` says which: induction cells, or those with most attention.
    `raw`: [source, source], sums to `score`, the mean over the cells of scale · q·k (before soft-cap and position
    bias). `terms`: the same for `lead`, the mean over the cells of the score minus the mean score of the other keys
    that the query sees, BOS and the query's other cells left out: what is the same for every key drops out of it.
    `error` is the largest error of both sums over the cells, relative to the head's largest score on the row.
    """

    sources: tuple[str, ...]
    cells: tuple[tuple[int, int], ...]
    kind: str
    raw: Floats
    terms: Floats
    score: float
    lead: float
    error: float

    def top(self, count: int) -> list[tuple[str, str, float]]:
        """The `count` largest terms as (query source, key source, part of `lead`), by absolute value, largest first."""
        order = np.argsort(-np.abs(self.terms), axis=None, kind="stable")[:count]
        pairs = zip(*np.unravel_index(order, self.terms.shape), strict=True)
        return [(self.sources[query], self.sources[key], float(self.terms[query, key])) for query, key in pairs]

    def record(self, count: int) -> dict[str, Any]:
        """The numbers as results.json holds them, with the `count` largest terms."""
        return {
            "cells": self.cells,
            "cells_are": self.kind,
            "score": self.score,
            "lead": self.lead,
            "relative_error": self.error,
            "sources": self.sources,
            "terms": [{"query": query, "key": key, "value": value} for query, key, value in self.top(count)],
        }


def parts(model: Model, tokens: Ints, layer: int, heads: Sequence[int], rules: Rules) -> dict[int, Parts]:
    """q and k of each of the `heads` of `layer` on one row of ids [pos], by source."""
    sides = {head: readers(model, layer, head) for head in heads}
    norm = norm_before(model, layer) or UNCHANGED
    names: list[str] = []
    read: dict[tuple[int, int], list[Floats]] = {(head, side): [] for head in heads for side in (0, 1)}
    stream = np.zeros(())
    for source, output in written(model, tokens, layer):
        names.append(source)
        stream = stream + output
        through = norm.linear(output)
        for (head, side), into in read.items():
            into.append(through @ sides[head][side].weight)
    made = {which: sides[which[0]][which[1]].read_parts(stream, np.stack(into)) for which, into in read.items()}
    if rules.rotation is not None:
        made = {which: rotate(part, *rules.rotation) for which, part in made.items()}
    return {head: Parts(tuple(names), made[head, 0], made[head, 1]) for head in heads}


def decompose(
    model: Model, tokens: Ints, interaction: Interaction, heads: Sequence[int], cells: Sequence[tuple[int, int]]
) -> dict[int, Decomposition]:
    """The mean score of `cells` (query, key) of each of `heads` on one row of ids [pos], by query source × key source.

    Without cells those `FALLBACK_CELLS` with most attention are taken, head by head.
    Raises UserError where the terms do not sum to the model's own score within 1e-4 relative (float32; 5e-2 in 16
    bits): then q and k are no linear function of the residual stream that we know of.
    """
    split = parts(model, tokens, interaction.layer, heads, interaction.rules)
    found = {}
    for head in heads:
        chosen = cells or largest_cells(interaction.pattern[0, head], FALLBACK_CELLS)
        kind = "induction cells" if cells else "cells with most attention"
        found[head] = _decomposition(split[head], interaction, head, chosen, kind)
        if not found[head].error <= _sum_error(model):
            raise UserError(
                f"the parts of head {Head.at(interaction.layer, head)} of {model.name} do not add up to its score (off "
                f"by {found[head].error:.2g} of its largest score, allowed {_sum_error(model):.2g}): no decomposition "
                "of it is shown"
            )
    return found


def _decomposition(
    split: Parts, interaction: Interaction, head: int, cells: Sequence[tuple[int, int]], kind: str
) -> Decomposition:
    rules, products = interaction.rules, interaction.products[0, head]
    query, key = (np.array(places, dtype=np.int64) for places in zip(*cells, strict=True))
    others = _other_keys(rules.visible[0], query, key)
    against = split.k[:, key] - np.einsum("cp,spd->scd", others, split.k)
    lead = leads(products, rules.visible[0], query, key)
    raw = rules.scale * _mean_products(split.q[:, query], split.k[:, key])
    terms = rules.scale * _mean_products(split.q[:, query], against)
    summed = rules.scale * split.q[:, query].sum(0)
    off = (summed * split.k[:, key].sum(0)).sum(-1) - products[query, key], (summed * against.sum(0)).sum(-1) - lead
    error = float(np.abs(off).max() / max(np.abs(products[rules.visible[0]]).max(), np.finfo(float).tiny))
    where = tuple((int(a), int(b)) for a, b in cells)
    return Decomposition(
        split.sources, where, kind, raw, terms, float(products[query, key].mean()), float(lead.mean()), error
    )


def leads(products: Floats, visible: Bools, query: Ints, key: Ints) -> Floats:
    """[cells]: each cell's entry of `products` [query, key], less the mean over the other keys in sight of its query,
    BOS and the query's other cells left out."""
    return products[query, key] - (_other_keys(visible, query, key) * products[query]).sum(-1)


def _other_keys(visible: Bools, query: Ints, key: Ints) -> Floats:
    """[cells, pos]: weights that average over the keys a query sees besides BOS and its own cells; 0 if none."""
    others = visible.copy()
    others[:, 0] = False
    others[query, key] = False
    return others[query] / np.maximum(others[query].sum(-1, keepdims=True), 1.0)


def _mean_products(q: Floats, k: Floats) -> Floats:
    """[source, source]: the mean over cells of q·k, from [source, cell, d_head] each."""
    return np.tensordot(q, k, axes=([1, 2], [1, 2])) / q.shape[1]


def largest_cells(pattern: Floats, count: int) -> list[tuple[int, int]]:
    """The `count` (query, key) cells with most attention in a pattern [query, key], BOS and first query left out."""
    candidates = np.where(np.tril(np.ones_like(pattern, dtype=bool)), pattern, -1.0)
    candidates[:2], candidates[:, 0] = -1.0, -1.0
    order = np.argsort(-candidates, axis=None, kind="stable")[:count]
    cells = zip(*np.unravel_index(order, pattern.shape), strict=True)
    return [(int(query), int(key)) for query, key in cells if candidates[query, key] >= 0]
