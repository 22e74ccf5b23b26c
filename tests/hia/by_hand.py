"""Measurements by hand, to compare with: one image, all heads at once, every pair, singular values."""

from __future__ import annotations

import math

import torch


def by_heads(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)  # [..., H, N, d]


def attention_by_hand(q, k, v, heads):
    """Attend for one image, all heads at once, as written in a textbook: [Q, D] and the weights [H, Q, N]."""
    q, k, v = (by_heads(x, heads) for x in (q, k, v))
    weights = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1)
    return (weights @ v).transpose(0, 1).flatten(1), weights


def entropy_by_hand(weights):
    return float((-weights * weights.log()).sum(-1).mean() / math.log(weights.shape[-1]))


def cosine_by_hand(rows):
    rows = rows / rows.norm(dim=1, keepdim=True)
    pairs = [float(rows[i] @ rows[j]) for i in range(len(rows)) for j in range(len(rows)) if i != j]
    return sum(pairs) / len(pairs)


def rank_by_hand(rows):
    energies = torch.linalg.svdvals(rows) ** 2
    shares = energies / energies.sum()
    return float((-(shares * shares.clamp_min(1e-300).log()).sum()).exp())


@torch.no_grad()
def layer_by_hand(model, inputs, index):
    """Compute the first HiA layer from the host's own hidden states, one image after the other."""
    plain = model.base_model(
        **{k: inputs[k] for k in ("input_ids", "attention_mask", "pixel_values")}, output_hidden_states=True
    ).hidden_states[index + 1]
    layer = model.adapter.layer(index)
    extractor, injection, heads = layer.extractor, layer.injection, layer.extractor.num_heads
    numbers = {name: [] for name in ("extraction", "injection", "query", "rank", "read", "update")}
    updates, rows, conditions = [], [], {}
    for image, features in enumerate(model.encode_images(inputs.high_res_pixels, inputs.windows).maps):
        sample = int((inputs.image_map == image).any(1).nonzero())
        queries = extractor.queries
        if extractor.condition is not None:
            conditions[sample] = extractor.condition(plain[sample, inputs.instruction_index[sample]])
            queries = queries + conditions[sample]
        tokens = features.flatten(0, 1)
        if model.adapter.feature_projection is not None:
            tokens = model.adapter.feature_projection(tokens)
        k, v = extractor.kv_proj(extractor.feature_norm(extractor.feature_projection(tokens))).chunk(2, -1)
        out, weights = attention_by_hand(extractor.q_proj(extractor.query_norm(queries)), k, v, heads)
        extracted = extractor.out_proj(out) + (queries if extractor.residual else 0)
        numbers["extraction"].append(entropy_by_hand(weights))
        numbers["query"].append(cosine_by_hand(extracted))
        numbers["rank"].append(rank_by_hand(extracted))

        visual = plain[inputs.image_map == image]
        k, v = injection.kv_proj(injection.extracted_norm(extracted)).chunk(2, -1)
        read, weights = attention_by_hand(injection.q_proj(injection.visual_norm(visual)), k, v, heads)
        update = injection.out_proj(read) * (1 if injection.gate is None else torch.tanh(injection.gate))
        numbers["injection"].append(entropy_by_hand(weights))
        numbers["read"].append(cosine_by_hand(read))
        numbers["update"].append(cosine_by_hand(update))
        updates.append(update)
        rows.append(visual)
    means = {name: sum(values) / len(values) for name, values in numbers.items()}
    means["ratio"] = float(torch.cat(updates).square().mean().sqrt() / torch.cat(rows).square().mean().sqrt())
    if conditions:
        added = torch.stack(list(conditions.values()))
        means["instruction"] = float((added.square().mean() / extractor.queries.square().mean()).sqrt())
    return means, torch.cat(updates), torch.cat(rows)
