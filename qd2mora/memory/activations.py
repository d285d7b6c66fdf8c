"""Activations: what a step keeps for its backward pass, and what the backward pass takes besides, in bytes.

Counted from what autograd saves in a LLaMA decoder layer with a frozen base: 4-bit and frozen linears save nothing, a
norm saves its input (in float32 where the layer is not `lean`), attention its rotated q, k, v and its output, the MLP
its gate and up (and the activated gate, not `lean`). An adapter saves its input, which linears that read one tensor
share, and its features in rank space.
Everything is linear in tokens but the mask of padded rows, which every batch has (widths are rounded up) unless a
card's kernel is quicker without.
"""

from dataclasses import dataclass

FLOAT = 4
IN_FLIGHT = 2
"""Layer inputs on the device where they live on the host: the one in use, and the one before or after it."""


@dataclass(frozen=True)
class MixedMLPs:
    """What one layer keeps where whole MLPs are mixed, which run as plain operations and not fused (`mlp_layer`)."""

    entries: int = 0
    """Entries a token, as wide as products: what goes to the up products."""
    dropped: int = 0
    """Entries a token, as wide as products, of dropped inputs; kept where there is dropout."""
    floats: int = 0
    """Float32 entries a token: masks of ranks, features, the router's numbers."""
    widened: int = 0
    """Entries a token that the router reads in float32: a copy where products are narrower."""
    copies: int = 0
    """Entries of banks laid side by side, as wide as products, whatever the tokens."""
    norms: int = 0
    """Float32 norms of the rows that experts with magnitudes scale."""

    def bytes_kept(self, done: "Pass") -> int:
        """Return what is kept of them for the backward pass."""
        a_token = done.item * self.entries + FLOAT * self.floats
        if done.dropout:
            a_token += done.item * self.dropped
        if done.item < FLOAT:
            a_token += FLOAT * self.widened
        return done.tokens * a_token + done.item * self.copies + FLOAT * self.norms


@dataclass(frozen=True)
class LayerShapes:
    """Widths of one decoder layer; adapters' are sums over its linears."""

    hidden: int
    intermediate: int
    heads: int
    heads_width: int
    cached_width: int
    """Entries of a token's keys, and of its values."""
    adapter_inputs: int
    adapter_features: int
    magnified: int
    """Entries a token that experts with magnitudes scale, and what is mixed after that."""
    mixed: MixedMLPs
    """What mixtures of whole MLPs keep besides."""
    rank_space: int
    """Floats a token while one adapter's step in rank space runs backward."""
    adapts_down: bool
    adapts_attention: bool = True
    is_lean: bool = True
    slots: int = 1
    """Copies of a token between an MLP's linears: the experts it chose, where whole MLPs are mixed."""
    norms: int = 2
    """Norms of the states: four where what a block gives is normed too (Gemma)."""
    norms_first: bool = True
    """Whether a layer's first norm reads the residual stream itself, and not what a block gives (OLMo 2)."""
    head_norms: int = 0
    """Entries a token of queries and keys that are normed (Qwen 3, Gemma 3, OLMo 2)."""
    head_factors: int = 0
    """Factors a token that those norms keep: one a head, or one where a norm spans the heads."""
    fused_width: int = 0
    """Width of q, k and v in one linear, which stays whole because values are a view of it (Phi-3)."""
    keeps_scores: bool = False
    """Whether attention is written out, scores and all: where they are capped (Gemma 2)."""
    scales_blocks: bool = False
    """Whether what a block gives is multiplied on its way into the residual stream (Granite)."""
    caps_logits: bool = False
    """Whether logits are capped, whose slope stands beside them in the backward pass (Gemma 2)."""
    num_rotary: int = 1
    """Tables of sines and cosines: two where windows have angles of their own (Gemma 3)."""


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass: rows of `length` tokens, products of `item` bytes an entry."""

    rows: int
    length: int
    item: int
    dropout: bool
    masks: bool = True
    """Whether attention is given a mask of padding."""

    @property
    def tokens(self) -> int:
        """Tokens in the pass, padding included."""
        return self.rows * self.length


def layer_bytes(layer: LayerShapes, done: Pass) -> int:
    """Return what one decoder layer keeps for its backward pass."""
    attention = _attention(layer, done)
    norms = layer.norms * _norm(layer, done) + done.item * layer.head_norms + FLOAT * layer.head_factors
    # gate and up, which the gated product reads; where layers are not lean the activated gate besides.
    mlp = done.item * (2 if layer.is_lean else 3) * layer.slots * layer.intermediate
    # x once where q, k and v read the same tensor, and u: all that the fused function saves.
    adapters = done.item * (layer.adapter_inputs + layer.adapter_features + layer.magnified)
    return done.tokens * (norms + attention + mlp + adapters) + layer.mixed.bytes_kept(done)


def _attention(layer: LayerShapes, done: Pass) -> int:
    """Return the bytes a token that attention keeps: rotated q, k and v for each head, what it gives, and the mask."""
    # Padding brings a mask; with one, keys and values are repeated for each head, and it is cast to the compute dtype.
    # Without, they may stay as few as they are; that is not counted, so that the plan is never too small.
    kept = done.item * 4 * layer.heads_width
    if layer.fused_width:
        kept += done.item * (layer.fused_width - layer.heads_width)
    # Fused attention keeps one float32 logsumexp a head and token in the place of scores.
    if layer.keeps_scores:
        return kept + _scores(layer, done)
    if done.masks:
        kept += done.item * done.length
    return kept + FLOAT * layer.heads


def _scores(layer: LayerShapes, done: Pass) -> int:
    """Return the bytes a token of scores written out: capped ones, their softmax in float32, and that in 16 bits."""
    entry = done.item + FLOAT
    if done.item < FLOAT:
        entry += done.item
    return layer.heads * done.length * entry


def kept_bytes(layer: LayerShapes, done: Pass, num_kept: int, is_whole: bool) -> int:
    """Return what layers that are not recomputed keep.

    `is_whole`: the first layer is among them; its first norm reads embeddings, which need no gradient, and keeps
    nothing, and the rotary tables are counted with it. Where attention has no adapter, no gradient passes its own
    either, up to the first MLP.
    """
    size = num_kept * layer_bytes(layer, done)
    if is_whole:
        size += _rotary(layer, done)
        size -= done.tokens * _before_gradients(layer, done)
    return size


def _before_gradients(layer: LayerShapes, done: Pass) -> int:
    """Return the bytes a token of what the first layer's parts do not keep, before its first adapter."""
    if layer.adapts_attention:
        return _norm(layer, done) if layer.norms_first else 0
    # The norms up to the MLP: in a block the half of them, and one where the residual stream itself is normed first.
    norms = layer.norms - layer.norms // 2 + layer.norms_first
    heads = done.item * layer.head_norms + FLOAT * layer.head_factors
    return norms * _norm(layer, done) + _attention(layer, done) + heads


def layer_inputs_bytes(layer: LayerShapes, done: Pass, num_layers: int) -> int:
    """Return what stays of each layer where it is recomputed: its input, and for all the boolean mask."""
    mask = done.tokens * done.length if done.masks else 0
    return num_layers * done.tokens * done.item * layer.hidden + mask + _rotary(layer, done)


def recomputed_bytes(layer: LayerShapes, done: Pass) -> int:
    """Return what one recomputed layer keeps besides its input, which its first norm need not copy."""
    size = layer_bytes(layer, done)
    if layer.norms_first and (layer.is_lean or done.item == FLOAT):
        # That norm saves the very tensor that the checkpoint keeps, unless it widens it.
        size -= done.tokens * done.item * layer.hidden
    return size


def backward_bytes(layer: LayerShapes, done: Pass, dequantised: int) -> dict[str, int]:
    """Return what the backward pass of one layer takes at its worst: gradients in the MLP, and the dequantised weight.

    Either the down projection's weight is dequantised beside the gradients of its output and input, or the gated
    product has three gradients of its width at once. An adapter on the down projection has let go of its input by
    then; with dropout the step in rank space still runs beside its mask.
    """
    hidden, wide = (done.tokens * done.item * width for width in (layer.hidden, layer.slots * layer.intermediate))
    # Of gate, of up, and of their product, which is gone only when both are made.
    gradients = hidden + 3 * wide
    if layer.scales_blocks:
        gradients += hidden
    is_mixed = layer.mixed != MixedMLPs()
    if is_mixed:
        gradients += done.tokens * FLOAT * layer.mixed.entries
    # Where whole MLPs are mixed, the last linear's input has two gradients, of the mean and of the features, beside it:
    # dropped, it is gone before them, and with magnitudes it has one.
    if layer.adapts_down and (not is_mixed or layer.magnified or done.dropout):
        gradients -= wide
        if done.dropout:
            gradients += done.tokens * FLOAT * layer.rank_space
    if is_mixed and not layer.magnified and done.item < FLOAT:
        # The mean over slots goes backward in float32, slot by slot: its gradient, the first slot, and of each other
        # the difference and its product, beside what is made for all slots and what the features gave them.
        a_slot = done.tokens * layer.intermediate * (done.item + 4 * FLOAT)
        gradients = max(gradients, hidden + 2 * wide + a_slot)
    if layer.keeps_scores:
        # Later, with the MLP's own gone: gradients of scores in float32, and twice in the compute dtype.
        scores = done.tokens * layer.heads * done.length * (FLOAT + 2 * done.item)
        gradients = max(gradients, scores + hidden - (2 * wide if layer.is_lean else 3 * wide))
    # The weight is freed before the gated product runs: whichever of the two moments is greater counts.
    if dequantised + hidden + wide > gradients:
        return {"gradients in a layer": hidden + wide, "largest weight dequantised": dequantised}
    return {"gradients in a layer": gradients}


def evaluation_bytes(layer: LayerShapes, vocab: int, done: Pass, chunk: int, dequantised: int) -> int:
    """Return what a forward pass takes that keeps nothing: an MLP with its widest weight, or a chunk of logits.

    Besides the layer's input and its normed one there are the gate, the activated gate and up, and the mask.
    """
    # As bool, and cast to the compute dtype.
    mask = done.tokens * done.length * (1 + done.item)
    wide = layer.slots * done.item * 3 * layer.intermediate
    mlp = done.tokens * (done.item * 3 * layer.hidden + wide) + dequantised + mask
    if layer.keeps_scores:
        scores = layer.heads * done.length * (FLOAT + 2 * done.item)
        mlp = max(mlp, done.tokens * (done.item * (2 * layer.hidden + 3 * layer.heads_width) + scores) + mask)
    # The last states and their normed copy stand beside the logits.
    return max(mlp, _logits_bytes(vocab, done, chunk) + done.tokens * 2 * done.item * layer.hidden)


def loss_bytes(layer: LayerShapes, vocab: int, done: Pass, chunk: int) -> int:
    """Return what the loss takes where every token is labelled, at its worst, in the backward pass.

    One chunk of logits; for all tokens what the last norm keeps, their states, and the gradient of these.
    """
    states = done.tokens * (_norm(layer, done) + 2 * done.item * layer.hidden)
    if layer.caps_logits:
        states += min(done.tokens, chunk) * vocab * FLOAT
    return _logits_bytes(vocab, done, chunk) + states + min(done.tokens, chunk) * layer.hidden * done.item


def _logits_bytes(vocab: int, done: Pass, chunk: int) -> int:
    """Return the bytes of a chunk of logits in float32, and beside them in 16 bits where products are."""
    entry = FLOAT
    if done.item < FLOAT:
        entry += done.item
    return min(done.tokens, chunk) * vocab * entry


def _norm(layer: LayerShapes, done: Pass) -> int:
    """Bytes a token that a norm keeps: its input and one float32 factor."""
    return (done.item if layer.is_lean else FLOAT) * layer.hidden + FLOAT


def _rotary(layer: LayerShapes, done: Pass) -> int:
    """Bytes of the sines and cosines of all positions, which the layers share."""
    return layer.num_rotary * 2 * done.item * done.length * (layer.heads_width // layer.heads)


__all__ = [
    "IN_FLIGHT",
    "LayerShapes",
    "Pass",
    "backward_bytes",
    "evaluation_bytes",
    "kept_bytes",
    "layer_inputs_bytes",
    "loss_bytes",
    "recomputed_bytes",
]
