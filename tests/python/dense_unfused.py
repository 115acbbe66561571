# SPDX-License-Identifier: MIT
"""The unfused operators in plain PyTorch, written from the window formula of dense.py; imports nothing of ours.

Tensors have their heads before the grid. Slow and memory-hungry on purpose.
"""

import itertools
import math

import dense
import torch


def per_axis(value, rank):
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * rank


def slots_of(grid, window, dilation, causal):
    """[tokens, slots] key of each slot or -1, and its index into a bias table, from the window formula of dense.py."""
    rank, tables = len(grid), []
    for n, k, d, c in zip(grid, *(per_axis(x, len(grid)) for x in (window, dilation, causal))):
        sees, offset = dense.axis_table(n, k, 1, d, c)
        keys = [[j for j in range(n) if sees[i, j]] for i in range(n)]
        tables.append([[(j, int(offset[i, j])) for j in row] + [None] * (k - len(row)) for i, row in enumerate(keys)])
    sizes = per_axis(window, rank)
    rows, bias_rows = [], []
    for query in itertools.product(*map(range, grid)):
        keys, entries = [], []
        for slot in itertools.product(*(table[i] for table, i in zip(tables, query))):
            key = entry = -1
            if None not in slot:
                key = entry = 0
                for (j, b), n, k in zip(slot, grid, sizes):
                    key, entry = key * n + j, entry * (2 * k - 1) + b
            keys.append(key)
            entries.append(entry)
        rows.append(keys)
        bias_rows.append(entries)
    return torch.tensor(rows), torch.tensor(bias_rows)


def dense_qk(q, k, extra_k, rpb, where, entries):
    """From full logits of all pairs."""
    full = q.flatten(2, -2) @ k.flatten(2, -2).transpose(-1, -2)
    attn = full.gather(-1, where.clamp(min=0).expand(*full.shape[:2], *where.shape))
    if rpb is not None:
        attn = attn + rpb.flatten(1)[:, entries.clamp(min=0)]
    attn = attn.masked_fill(where < 0, -math.inf)
    if extra_k is not None:
        attn = torch.cat([attn, q.flatten(2, -2) @ extra_k.transpose(-1, -2)], -1)
    return attn.reshape(*q.shape[:-1], attn.shape[-1])


def dense_av(attn, v, extra_v, where):
    flat, values = attn.flatten(2, -2), v.flatten(2, -2)
    on_grid = flat[..., : where.shape[1]].masked_fill(where < 0, 0)
    weights = flat.new_zeros(*flat.shape[:3], values.shape[2] + 1)
    weights = weights.scatter_add(-1, where.where(where >= 0, values.shape[2]).expand_as(on_grid), on_grid)
    out = weights[..., :-1] @ values
    if extra_v is not None:
        out = out + flat[..., where.shape[1] :] @ extra_v
    return out.reshape(*attn.shape[:-1], v.shape[-1])


def attention(q, k, v, window, dilation=1, causal=False, rpb=None):
    """(logits, out) of softmax attention on heads-first tensors, nothing scaled; in the type of its arguments."""
    where, entries = slots_of(q.shape[2:-1], window, dilation, causal)
    logits = dense_qk(q, k, None, rpb, where, entries)
    return logits, dense_av(logits.softmax(-1), v, None, where)
