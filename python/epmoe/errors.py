"""The one error type."""


class EpmoeError(Exception):
    """What went wrong and how to mend it.

    ``code`` is stable and meant to be matched on (``"ERR_SHAPE"``); ``op``, ``argument``, ``expected``, ``received``
    and ``hint`` say the rest, each a string that may be empty.
    """

    def __init__(self, code, *, op="", argument="", expected="", received="", hint=""):
        self.code, self.op, self.argument = code, op, argument
        self.expected, self.received, self.hint = expected, received, hint
        where = "".join(f"{part}: " for part in (op, argument) if part)
        what = f"expected {expected}, received {received}" if expected else received
        report = "This is a bug in epmoe: please report it with this message" if code == "ERR_INTERNAL" else ""
        super().__init__(where + ". ".join(part for part in (what, hint, report) if part))
