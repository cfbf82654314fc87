"""Tokens on their way to the ranks that hold their experts, and back: the torch part of the all-to-all scheme.

A token goes once to each rank that has an expert of its, with its choices there in that rank's own numbering (-1: not
there) and their weights; what comes back is that rank's weighted sum. So a rank is to tokens what an expert is to rows,
and the same kernels order, pack and sum them: ``preprocess`` over destinations, ``pre_reorder``, ``post_reorder``.
Tokens travel in chunks, so that one chunk is under way while the experts work on another.
"""

import itertools

import torch

__all__ = ["Route"]


class Route:
    """Where the experts are: ``starts`` are the ranks' first experts, and the number of all as the last entry."""

    def __init__(self, group, starts, chunks, device):
        self.group, self.chunks, self.starts = group, chunks, starts
        counts = torch.tensor(starts).diff()
        ranks = torch.repeat_interleave(torch.arange(group.size), counts)
        # By id + 2: -1 is nowhere, and any other id that is no expert's goes beyond the last rank.
        beyond = torch.tensor([group.size])
        self._rank_of = torch.cat([beyond, torch.tensor([-1]), ranks, beyond]).to(device)
        self._first = torch.tensor(starts[:-1], device=device)

    def exchange(self, topk_ids, topk_weights):
        """One call's traffic. topk_ids, topk_weights [T, K]."""
        return Exchange(self, topk_ids, topk_weights)

    def rank_of(self, topk_ids):
        return self._rank_of[(topk_ids.long() + 2).clamp_(0, self._rank_of.shape[0] - 1)]

    def first(self, ranks):
        return self._first[ranks]

    def refuse(self, message):
        """Tells the other ranks that this one cannot make the call; raises as ``agree`` does."""
        self.group.refuse(message)
        rows = torch.zeros(self.group.size, 2 + self.chunks, dtype=torch.int64, device=self._first.device)
        self.group.agree(rows)


class Exchange:
    @torch.no_grad()
    def __init__(self, route, topk_ids, topk_weights):
        self._route, self._ids, self._weights = route, topk_ids, topk_weights
        (tokens, topk), size = topk_ids.shape, route.group.size
        self._ranks = ranks = route.rank_of(topk_ids)
        again = (ranks[:, :, None] == ranks[:, None, :]).tril_(-1).any(-1)
        chunk = torch.arange(tokens, device=ranks.device) * route.chunks // max(tokens, 1)
        destinations = torch.where(again & (ranks < size) | (ranks < 0), -1, ranks + chunk[:, None] * size)
        # What preprocess orders: chunk * W + rank, or -1; an id that is no expert's stays one that is out of range.
        self.destinations = destinations.masked_fill_(ranks == size, size * route.chunks).to(torch.int32)
        self.ones = topk_weights.new_ones(tokens, topk, dtype=torch.float32)
        self.returned = None
        self._works = {}

    @torch.no_grad()
    def agree(self, seg_indptr):
        """Tells the ranks how many tokens come, and learns it of them; the host waits. Returns the rows to send."""
        group, chunks, topk = self._route.group, self._route.chunks, self._ids.shape[1]
        self._counts = seg_indptr.diff()
        rows = torch.empty(group.size, 2 + chunks, dtype=torch.int64, device=seg_indptr.device)
        rows[:, 0], rows[:, 1], rows[:, 2:] = 1, topk, self._counts.view(chunks, group.size).t()
        received, sent = group.agree(rows)
        group.must_be_same("topk_ids", "slots a token", [row[1] for row in received])
        self._sent, self._received = ([list(part) for part in zip(*each, strict=True)][2:] for each in (sent, received))
        self._ends = [0, *itertools.accumulate(map(sum, self._sent))]
        return self._ends[-1]

    @torch.no_grad()
    def pack(self, rows, src2dst):
        """Takes the rows to send, [S, H], as pre_reorder packs them by src2dst; works out what goes with them."""
        self._rows, topk = rows, self._ids.shape[1]
        count, size = rows.shape[0], self._route.group.size
        # The token of each row; slots without a row write to one more, which nobody reads.
        slots = torch.where(src2dst < 0, count, src2dst).long()
        tokens = torch.arange(slots.shape[0], device=rows.device) // topk
        token = torch.empty(count + 1, dtype=torch.int64, device=rows.device).scatter_(0, slots, tokens)[:count]
        ranks = torch.arange(size, device=rows.device).repeat(self._route.chunks)
        rank = torch.repeat_interleave(ranks, self._counts, output_size=count)
        ids = self._ids[token] - self._route.first(rank)[:, None]
        local = torch.where(self._ranks[token] == rank[:, None], ids, -1).to(torch.int32)
        self._choices = torch.cat([local, self._weights[token].float().view(torch.int32)], dim=1)
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
        ids, weights = (half.contiguous() for half in choices.chunk(2, dim=1))
        return [rows, ids, weights.view(torch.float32), torch.empty_like(rows)]

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
