"""Tokens as text, while they come, and as bytes."""

from tokenizers import decoders
from transformers.convert_slow_tokenizer import bytes_to_unicode

# A character is at most four bytes, but bytes that are no text may hold back more.
LONGEST_WAIT = 16

_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}
# A normalizer may write a character of four bytes as one of a single byte. Where characters are dropped altogether, a
# text may be refused that would have fitted, though only one that is made of little else.
_SHRINKS = 4


def _byte_level(tokenizer):
    return isinstance(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None), decoders.ByteLevel)


def _spelled(name):
    """A token of a byte-level tokenizer, as the decoder reads it: each character is a byte, or none is."""
    own = [_BYTES.get(character) for character in name]
    return list(name.encode()) if None in own else own


def bytes_of(tokenizer, token):
    """A token's own bytes, which may be part of a character; None where the tokenizer does not say."""
    name = tokenizer.convert_ids_to_tokens(token) if _byte_level(tokenizer) else None
    return None if name is None else _spelled(name)


def most_bytes(tokenizer):
    """The most bytes of text that one token stands for."""
    names = tokenizer.get_vocab()
    if not _byte_level(tokenizer):
        return _SHRINKS * max(len(name.encode()) for name in names)
    longest = max(len(_spelled(name)) for name in names)
    return longest if tokenizer.backend_tokenizer.normalizer is None else _SHRINKS * longest


class Detokenizer:
    """Turns one sequence's tokens into text piece by piece; a character that is not complete yet is held back."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._tokens = []
        self._told = 0  # tokens whose text is out
        self._context = 0  # where decoding starts, for some tokenizers write a token by what comes before it

    def push(self, token):
        """The text that is certain now, and the text that is held back: what would come if this were the end."""
        self._tokens.append(token)
        before = self._decode(self._tokens[self._context : self._told])
        text = self._decode(self._tokens[self._context :])[len(before) :]
        if text.endswith("\ufffd") and len(self._tokens) - self._told < LONGEST_WAIT:
            return "", text
        self._context, self._told = self._told, len(self._tokens)
        return text, ""

    def _decode(self, tokens):
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
