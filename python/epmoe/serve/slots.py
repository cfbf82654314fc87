"""The KV cache of a changing set of sequences, and attention on it.

A forward pass gets the tokens of all sequences one after the other, [1, N], without padding: whole prompts, parts of
prompts and single tokens side by side. Only attention knows which token belongs to which sequence. Each sequence has
a slot of the cache, which is allocated once.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
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


class Group:
    """Rows of as many tokens each, for which attention is computed at once."""

    def __init__(self, rows, device):
        tokens = [row.first + i for row in rows for i in range(row.count)]
        dense = tokens[-1] - tokens[0] == len(tokens) - 1  # rows come in the order of their tokens
        self.shape = (len(rows), rows[0].count)
        # Where its tokens are in the pass.
        self.place = slice(tokens[0], tokens[-1] + 1) if dense else torch.tensor(tokens).to(device)
        slots = [row.slot for row in rows]
        self.slots = slice(slots[0], slots[0] + 1) if len(slots) == 1 else torch.tensor(slots).to(device)
        self.length = max(row.end for row in rows)
        starts = torch.tensor([row.start for row in rows]).to(device)
        self._own = starts[:, None] + torch.arange(rows[0].count, device=device)
        self._biases = {}

    def bias(self, sliding_window, times, dtype):
        """0 where a token may look, at itself and what came before it, else -inf: [rows, 1, times * tokens, length].

        It serves all layers, so it is made as CUDA's kernel wants it: in the dtype of the queries, its rows at
        multiples of 16 elements.
        """
        key = sliding_window, times, dtype
        if key not in self._biases:
            own = self._own[:, None, None, :, None]
            other = torch.arange(-(-self.length // 16) * 16, device=own.device)
            hidden = other > own
            if sliding_window is not None:
                hidden |= other <= own - sliding_window
            bias = torch.zeros(hidden.shape, dtype=dtype, device=own.device).masked_fill_(hidden, -torch.inf)
            self._biases[key] = bias.expand(-1, -1, times, -1, -1).flatten(2, 3)[..., : self.length]
        return self._biases[key]


class SlotCache:
    """What transformers calls ``past_key_values``: keys and values [slots, heads, context, width] for each layer."""

    def __init__(self, slots, context):
        self._slots, self._context = slots, context
        self._layers = {}
        self._slot_of_token = self._position_of_token = None
        self.groups = []

    def begin(self, rows, device):
        """Sets the rows of the next pass; returns the tokens' positions, [1, N]."""
        by_count = {}
        for row in rows:
            by_count.setdefault(row.count, []).append(row)
        self.groups = [Group(part, device) for part in by_count.values()]
        positions = [position for row in rows for position in range(row.start, row.end)]
        slots = [row.slot for row in rows for _ in range(row.count)]
        self._slot_of_token, self._position_of_token = torch.tensor([slots, positions]).to(device)
        return self._position_of_token[None]

    def update(self, keys, values, layer, *_, **__):
        """Stores a layer's new keys and values, [1, heads, N, width]; attention reads them by :meth:`read`."""
        if layer not in self._layers:
            self._layers[layer] = tuple(self._store(each) for each in (keys, values))
        for store, new in zip(self._layers[layer], (keys, values), strict=True):
            store[self._slot_of_token, :, self._position_of_token] = new[0].transpose(0, 1)
        return keys, values

    def _store(self, like):
        heads, width = like.shape[1], like.shape[3]
        try:
            # Zeros, for what lies behind a sequence's end is multiplied by a probability of zero.
            return like.new_zeros(self._slots, heads, self._context, width)
        except RuntimeError as error:
            size = self._slots * self._context * heads * width * like.element_size() / 2**30
            raise ValueError(
                f"slots, context: expected a cache that fits the memory of {like.device}, received {self._slots} slots "
                f"of {self._context} tokens, {size:.1f} GiB for one layer's keys alone; ask for fewer or shorter ones"
            ) from error

    def get_seq_length(self, *_):
        return 0

    def read(self, layer, slots, length):
        """Keys and values of some slots (a slice or indices) up to ``length``, [slots, heads, length, width]."""
        return tuple(store[slots, :, :length] for store in self._layers[layer])


def kernels():
    """The kernels that attention may use, in a ``with`` block; torch knows but one setting for all threads.

    Not cuDNN's, which torch prefers on Hopper: it makes a plan of its own for each number of rows, tokens and length,
    for tens of milliseconds, and keeps them all. A served model comes to new ones without end.
    """
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def attend(module, query, key, value, attention_mask, scaling=None, sliding_window=None, slots=None, **options):
    """Attention of all rows on what the cache has of their sequences.

    query [1, heads, N, width]; the result is [1, N, heads, width], as transformers wants it. ``slots`` is the cache.
    """
    if options.get("s_aux") is not None or options.get("softcap") is not None:
        raise NotImplementedError("attention with sinks or a soft cap")
    out = query.new_empty(query.shape[2], query.shape[1], value.shape[3])
    times = query.shape[1] // key.shape[1]
    for group in slots.groups:
        keys, values = slots.read(module.layer_idx, group.slots, group.length)
        # [rows, heads, tokens of a row, width]; heads that share keys stand side by side, and pass for more tokens.
        queries = query[0, :, group.place].unflatten(1, group.shape).transpose(0, 1)
        result = functional.scaled_dot_product_attention(
            queries.unflatten(1, (-1, times)).flatten(2, 3),
            keys,
            values,
            attn_mask=group.bias(sliding_window, times, query.dtype),
            scale=scaling,
        )
        out[group.place] = result.unflatten(2, (times, -1)).flatten(1, 2).transpose(1, 2).flatten(0, 1)
    return out[None], None


AttentionInterface.register(IMPLEMENTATION, attend)
