"""An initialisation in which a token can find what followed the same token before: layer 0 looks back, layer 1 matches and copies.

Matching by content is slow to appear in a small model: nothing is gained by looking back before something matches, nor by matching
before something looks back. Here both exist from the start, weakly, in a few heads; training is free to change or to drop them.

The residual stream of width d begins with the embeddings in its lower half (dimension 0 the same for all tokens) and an empty
upper half, cut into one slot for each head of layer 0:

    layer 0, head h:  q and k are constant vectors whose rotary score is largest at distance h + 1; it writes the first dims of
                      that token's embedding into slot h.
    layer 1, heads of the first group:   keys are slot 0 of a position, queries the embedding of the current token: the score is
                      large where the token before was the current one.
    layer 1, heads of the second group:  the same for the last two tokens, slots 0 and 1 against the embedding and slot 0.
    Both write the embedding of the token that they find.

Only dims that rotary hardly turns inside the window compare contents.
"""

from __future__ import annotations

import torch
from transformers import LlamaForCausalLM


@torch.no_grad()
def initialise(
    model: LlamaForCausalLM, unit: float = 0.5, constant: float = 4.0, look_back: float = 2.0, match: float = 3.0, write: float = 5.0
) -> None:
    """Overwrites parts of the weights of a freshly made model.

    unit       standard deviation of the embeddings: large beside a step of training, or the first steps would wipe out what is laid here.
    constant   dimension 0 of the embeddings, in such units.
    look_back  weight of the constant vectors; match, of the compared contents; write, of what is copied, in embedding units.
    """
    config = model.config
    d, heads, groups, size = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
    half, each = d // 2, d // 2 // heads
    embeddings = model.model.embed_tokens.weight
    embeddings.mul_(unit / config.initializer_range)
    model.model.norm.weight.fill_(0.1 / unit)  # the embeddings are the head too: keep the first logits small
    embeddings[:, half:] = 0.0
    embeddings[:, 0] = constant * unit
    frequencies = model.model.rotary_emb.inv_freq.cpu()
    pairs = size // 2
    fast = [i for i in range(pairs) if frequencies[i] > 0.05]
    still = [i for i in range(pairs) if frequencies[i] * config.max_position_embeddings < 0.7]
    still += [i + pairs for i in still]  # both dims of the pairs that hardly turn

    first, second = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.mul_(0.3)
        layer.self_attn.o_proj.weight.mul_(0.3)
    for group in range(groups):
        k = first.k_proj.weight[group * size : (group + 1) * size]
        k[fast, 0] = look_back
        v = first.v_proj.weight[group * size : (group + 1) * size]
        v.zero_()
        v[range(each), range(1, each + 1)] = 1.0
    for head in range(heads):
        angle = -frequencies[fast] * (head + 1)
        q = first.q_proj.weight[head * size : (head + 1) * size]
        q[fast, 0] = look_back * torch.cos(angle)
        q[[i + pairs for i in fast], 0] = look_back * torch.sin(angle)
        out = first.o_proj.weight[:, head * size : (head + 1) * size]
        out.zero_()
        out[range(half + head * each, half + (head + 1) * each), range(each)] = unit

    def slot(n: int, count: int) -> range:
        return range(half + n * each, half + n * each + count)

    one, two = min(len(still), each), min(len(still) // 2, each)
    for group in range(groups):
        k = second.k_proj.weight[group * size : (group + 1) * size]
        v = second.v_proj.weight[group * size : (group + 1) * size]
        v.zero_()
        v[range(size), range(1, size + 1)] = 1.0
        for head in range(group * heads // groups, (group + 1) * heads // groups):
            q = second.q_proj.weight[head * size : (head + 1) * size]
            if group == 0:
                k[still[:one], slot(0, one)] = match
                q[still[:one], range(1, one + 1)] = match
            else:
                k[still[:two], slot(0, two)] = match * 1.4
                q[still[:two], range(1, two + 1)] = match * 1.4
                k[still[two : 2 * two], slot(1, two)] = match * 1.4
                q[still[two : 2 * two], slot(0, two)] = match * 1.4
            out = second.o_proj.weight[:, head * size : (head + 1) * size]
            out.zero_()
            out[range(1, size + 1), range(size)] = write * unit
