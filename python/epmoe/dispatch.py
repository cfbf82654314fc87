"""Tokens on their way to the ranks that hold their experts, and back: the torch part of the all-to-all scheme.

A token goes once to each rank that has an expert of its, with its choices and their weights; there, choices of other
ranks count for nothing, and what comes back is that rank's weighted sum. So a rank is to tokens what an expert is to
rows, and the same kernels order, pack and sum them: ``preprocess`` over destinations, ``pre_reorder`` and
``post_reorder``. Tokens travel in chunks, so that one chunk is under way while the experts work on another.
"""

import functools
import itertools

import torch

__all__ = ["Route"]


class Route:
    """Where a layer's experts are: ``starts`` are the ranks' first ones, and the number of all as the last entry.

    ``layer`` is its number in the group, and ``chunks`` what a call's tokens are cut into.
    """

    def __init__(self, group, layer, starts, chunks, device):
        self.group, self.layer, self.chunks, self.device = group, layer, chunks, device
        group.expect(chunks)
        ranks = torch.repeat_interleave(torch.arange(group.size), torch.tensor(starts).diff())
        experts = torch.arange(starts[-1])
        first, end = starts[group.rank : group.rank + 2]
        table = lambda *parts: torch.cat([torch.as_tensor(part).view(-1) for part in parts]).to(device, torch.int32)
        # By id + 2: -1 goes nowhere, any other id that is no expert's beyond all ranks, so that preprocess reports it.
        beyond = group.size * chunks
        self.rank_of = table(beyond, -1, ranks, beyond)
        self.known = table(-1, -1, experts, -1)
        # By id, so that -1 has the last entry: the id on this rank, or -1.
        self.local = table(torch.where((experts >= first) & (experts < end), experts - first, -1), -1)

    def exchange(self, topk_ids, topk_weights):
        """One call's traffic. topk_ids, topk_weights [T, K]."""
        return Exchange(self, topk_ids, topk_weights)


class Exchange:
    @torch.no_grad()
    def __init__(self, route, topk_ids, topk_weights):
        self._route = route
        (tokens, self._topk), size = topk_ids.shape, route.group.size
        index = (topk_ids + 2).clamp_(0, route.rank_of.shape[0] - 1)
        # What preprocess orders: chunk * W + rank, -1 where a slot before has the token sent there already.
        ranks = route.rank_of[index]
        again = (ranks[:, :, None] == ranks[:, None, :]).logical_and_(_before(self._topk, route.device))
        ranks.masked_fill_(again.any(-1), -1)
        if route.chunks > 1:
            ranks += _offsets(tokens, route.chunks, size, route.device) * (ranks >= 0)
        self.destinations = ranks
        # What goes with each token, [T, 2K] float32: the bits of its choices, int32, and their weights.
        self.choices = torch.cat([route.known[index].view(torch.float32), topk_weights.float()], dim=1)
        self.ones = topk_weights.new_ones(tokens, self._topk, dtype=torch.float32)
        self.returned = None
        self._works = {}

    @torch.no_grad()
    def agree(self, seg_indptr):
        """Tells the ranks how many tokens come, and learns it of them; the host waits. Returns the rows to send."""
        group, chunks = self._route.group, self._route.chunks
        counts = seg_indptr.diff().view(chunks, group.size).t()
        received, sent = group.agree(self._route.layer, self._topk, counts)
        self._sent, self._received = ([list(part) for part in zip(*each, strict=True)] for each in (sent, received))
        self._ends = [0, *itertools.accumulate(map(sum, self._sent))]
        return self._ends[-1]

    def pack(self, rows, choices):
        """Takes what is to be sent, [S, H] and [S, 2K], as pre_reorder packs hidden states and ``choices``."""
        self._rows, self._choices = rows, choices
        self.returned = torch.empty_like(rows)

    def dispatch(self, chunk):
        """Sends a chunk's tokens, under way on return."""
        sent, received = self._sent[chunk], self._received[chunk]
        rows, choices = (self._slice(each, chunk) for each in (self._rows, self._choices))
        got = [each.new_empty(sum(received), each.shape[1]) for each in (rows, choices)]
        works = [self._route.group.all_to_all(*pair, received, sent) for pair in zip(got, (rows, choices), strict=True)]
        self._works[chunk] = (works, got)

    def arrived(self, chunk):
        """What has come to this rank: rows [R, H], ids and weights [R, K], and where their sums belong, [R, H]."""
        works, (rows, choices) = self._works.pop(chunk)
        for work in works:
            self._route.group.wait(work)
        ids, weights = choices.chunk(2, dim=1)
        return [rows, self._route.local[ids.view(torch.int32)], weights.contiguous(), torch.empty_like(rows)]

    def combine(self, chunk, sums):
        """Sends the sums back where their tokens came from, under way on return."""
        back = self._slice(self.returned, chunk)
        self._works[chunk] = self._route.group.all_to_all(back, sums, self._sent[chunk], self._received[chunk])

    def finish(self):
        """Waits for all sums: ``returned`` holds them in the order of ``pack``'s rows."""
        for work in self._works.values():
            self._route.group.wait(work)
        return self.returned

    def _slice(self, tensor, chunk):
        return tensor[self._ends[chunk] : self._ends[chunk + 1]]


@functools.lru_cache(maxsize=8)
def _before(topk, device):
    """[K, K]: which slots come before each."""
    return torch.ones(topk, topk, dtype=torch.bool, device=device).tril(-1)


@functools.lru_cache(maxsize=8)
def _offsets(tokens, chunks, size, device):
    """[T, 1]: where the destinations of a token's chunk begin."""
    return (torch.arange(tokens, device=device)[:, None] * chunks // max(tokens, 1) * size).to(torch.int32)
