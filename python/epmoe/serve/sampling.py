"""From logits to tokens."""

import torch

# What OpenAI tells of tokens that are next to impossible; JSON has neither -inf nor NaN.
UNLIKELY = -9999.0


def sample(logits, wishes):
    """A token for each row of logits [R, V], float32, as its wish says; a list of R ints.

    A wish has ``temperature``, ``top_p`` and ``uniform``, a number in [0, 1) that decides: the same logits and the same
    number give the same token, whatever else is in the batch. At temperature 0 it is the likeliest token.
    """
    tokens = logits.argmax(-1)
    drawn = [row for row, wish in enumerate(wishes) if wish["temperature"] > 0]
    if drawn:
        # What is above 0 stays so in float32, and what is below 1 stays below.
        least, most = torch.finfo(torch.float32).tiny, 1 - torch.finfo(torch.float32).eps / 2
        column = lambda name: torch.tensor([[wishes[row][name]] for row in drawn]).to(logits.device)
        # From the likeliest downwards, for a small temperature makes large numbers.
        below = logits[drawn] - logits[drawn].amax(-1, keepdim=True)
        probabilities = torch.softmax(below / column("temperature").clamp(min=least), -1)
        probabilities, order = probabilities.sort(-1, descending=True)
        # Of the tokens in order of likelihood, those before which less than top_p is gathered: always one.
        before = probabilities.cumsum(-1) - probabilities
        nucleus = torch.where(before < column("top_p").clamp(min=least), probabilities, 0).cumsum(-1)
        place = torch.searchsorted(nucleus, nucleus[:, -1:] * column("uniform").clamp(max=most), right=True)
        tokens[drawn] = order.gather(1, place.clamp(max=logits.shape[1] - 1))[:, 0]
    return tokens.tolist()


def log_probabilities(logits, token, count):
    """Of one row of logits, [V]: the token's log probability, and the ``count`` likeliest tokens with theirs."""
    values = torch.log_softmax(logits, -1).nan_to_num(nan=UNLIKELY, neginf=UNLIKELY)
    top, order = values.topk(min(count, len(values)))
    return values[token].item(), list(zip(order.tolist(), top.tolist(), strict=True))
