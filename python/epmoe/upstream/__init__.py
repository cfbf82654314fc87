"""Functions under the names and with the signatures they had upstream, one module an op."""

from epmoe.errors import EpmoeError


def require_topk(op, topk_ids, topk):
    """The old signatures repeat K, which topk_ids [T, K] already tells."""
    if topk_ids.shape[-1] == topk:
        return
    expected = f"{topk_ids.shape[-1]}, the last size of topk_ids"
    raise EpmoeError("ERR_VALUE", op=op, argument="topk", expected=expected, received=str(topk))
