"""The KV cache of a changing set of sequences, and attention on it.

A forward pass gets the tokens of all sequences one after the other, [1, N], without padding: whole prompts, parts of
prompts and single tokens side by side. Only attention knows which token belongs to which sequence. Each sequence has
a slot of the cache, which is allocated once.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers import AttentionInterface

IMPLEMENTATION = "epmoe_slots"


@dataclass
class Row:
    """A sequence's part of a pass: ``count`` tokens from position ``start`` on, beginning at token ``first``."""

    slot: int
    start: int
    first: int
    count: int

    @property
    def end(self):
        return self.start + self.count


class SlotCache:
    """What transformers calls ``past_key_values``: keys and values [slots, heads, context, width] for each layer."""

    def __init__(self, slots, context):
        self._slots, self._context = slots, context
        self._layers = {}
        self._rows = []
        self._slot_of_token = self._position_of_token = None

    def begin(self, rows, device):
        """Sets the rows of the next pass; returns the tokens' positions, [1, N]."""
        self._rows = rows
        positions = [position for row in rows for position in range(row.start, row.end)]
        slots = [row.slot for row in rows for _ in range(row.count)]
        self._slot_of_token, self._position_of_token = torch.tensor([slots, positions]).to(device)
        return self._position_of_token[None]

    def update(self, keys, values, layer, *_, **__):
        """Stores a layer's new keys and values, [1, heads, N, width]; attention reads them by :meth:`read`."""
        if layer not in self._layers:
            self._layers[layer] = tuple(
                # Zeros, for what lies behind a sequence's end is multiplied by a probability of zero.
                each.new_zeros(self._slots, each.shape[1], self._context, each.shape[3])
                for each in (keys, values)
            )
        for store, new in zip(self._layers[layer], (keys, values), strict=True):
            store[self._slot_of_token, :, self._position_of_token] = new[0].transpose(0, 1)
        return keys, values

    def get_seq_length(self, *_):
        return 0

    @property
    def rows(self):
        return self._rows

    def read(self, layer, slots, length):
        """Keys and values of some slots up to ``length``, [len(slots), heads, length, width]."""
        return tuple(
            store[slots[0] : slots[0] + 1, :, :length] if len(slots) == 1 else store[slots, :, :length]
            for store in self._layers[layer]
        )


def attend(module, query, key, value, attention_mask, scaling=None, sliding_window=None, slots=None, **options):
    """Attention of all rows: sequences that get one token in one batch, and each longer part for itself.

    query [1, heads, N, width]; the result is [1, N, heads, width], as transformers wants it. ``slots`` is the cache.
    """
    if options.get("s_aux") is not None or options.get("softcap") is not None:
        raise NotImplementedError("attention with sinks or a soft cap")
    out = query.new_empty(query.shape[2], query.shape[1], value.shape[3])
    single = [row for row in slots.rows if row.count == 1]
    for rows in ([single] if single else []) + [[row] for row in slots.rows if row.count > 1]:
        tokens = [row.first + i for row in rows for i in range(row.count)]
        place = slice(tokens[0], tokens[-1] + 1) if tokens[-1] - tokens[0] == len(tokens) - 1 else tokens
        # [rows, heads, tokens of a row, width]
        queries = query[0, :, place].unflatten(1, (len(rows), rows[0].count)).transpose(0, 1)
        keys, values = slots.read(module.layer_idx, [row.slot for row in rows], max(row.end for row in rows))
        mask = _mask(rows, keys.shape[2], sliding_window, query.device)
        grouped = keys.shape[1] != queries.shape[1]
        result = functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, scale=scaling, enable_gqa=grouped
        )
        out[place] = result.transpose(1, 2).flatten(0, 1)
    return out[None], None


def _mask(rows, length, sliding_window, device):
    """What each token may look at: itself and what came before it, [rows, 1, tokens, length]."""
    first = torch.tensor([row.start for row in rows]).to(device)
    own = first[:, None] + torch.arange(rows[0].count, device=device)
    other = torch.arange(length, device=device)
    mask = other <= own[..., None]
    if sliding_window is not None:
        mask &= other > own[..., None] - sliding_window
    return mask[:, None]


AttentionInterface.register(IMPLEMENTATION, attend)
