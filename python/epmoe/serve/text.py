"""Tokens as text, while they come."""

# A character is at most four bytes, but bytes that are no text may hold back more.
LONGEST_WAIT = 16


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
