"""Python files: found, read and written without losing a byte."""

import ast
import codecs
import contextlib
import errno
import io
import mmap
import os
import re
import stat
import tempfile
import tokenize
import warnings
from dataclasses import dataclass

MAX_BYTES = 16 << 20
_LEFT_OUT = {"__pycache__", "node_modules"}
_LINE_END = re.compile(r"\r\n|\r|\n")


@dataclass(frozen=True)
class Problem:
    """A file that was not scanned. ``harmless``: it holds no code that another file does not."""

    file: str
    kind: str
    reason: str
    harmless: bool = False


class Unusable(Exception):  # noqa: N818
    """Why a file cannot be scanned or written."""

    def __init__(self, kind, reason, harmless=False):
        super().__init__(reason)
        self.kind, self.harmless = kind, harmless

    def problem(self, file):
        return Problem(file, self.kind, str(self), self.harmless)


def files_below(paths, problems):
    """The ``*.py`` files in folders, and the files named; each once, whatever links lead to it.

    Left out of folders: hidden entries, ``__pycache__``, ``node_modules`` and virtual environments.
    """
    files, folders = set(), set()
    stack = [(os.fspath(path), frozenset()) for path in reversed(paths)]
    named = {path for path, _ in stack}
    while stack:
        path, above = stack.pop()
        try:
            found = os.stat(path)
            identity = found.st_dev, found.st_ino
            if stat.S_ISDIR(found.st_mode):
                if identity in above:
                    raise Unusable("symlink-loop", "a link to a folder that it is in", harmless=True)
                if identity not in folders and (path in named or not os.path.exists(os.path.join(path, "pyvenv.cfg"))):
                    folders.add(identity)
                    stack += [(child, above | {identity}) for child in reversed(_children(path))]
            elif not stat.S_ISREG(found.st_mode):
                raise Unusable("not-a-file", "neither a file nor a folder", harmless=True)
            elif (real := os.path.realpath(path)) not in files:
                files.add(real)
                yield path
        except OSError as error:
            problems.append(_unreadable(error, path).problem(path))
        except Unusable as error:
            problems.append(error.problem(path))


def _children(folder):
    with os.scandir(folder) as entries:
        return sorted(
            entry.path
            for entry in entries
            if not entry.name.startswith(".")
            and entry.name not in _LEFT_OUT
            and (entry.name.endswith(".py") or _may_be_folder(entry))
        )


def _may_be_folder(entry):
    try:
        return entry.is_dir()
    except OSError:
        return True


def _unreadable(error, path):
    if error.errno == errno.ELOOP:
        return Unusable("symlink-loop", "a link that leads to itself", harmless=True)
    if error.errno == errno.ENOENT:
        reason = "a link to nothing" if os.path.islink(path) else "it was there, and is gone"
        return Unusable("vanished", reason, harmless=True)
    return Unusable("unreadable", error.strerror or type(error).__name__)


def read(path, pattern):
    """The bytes of a file that the pattern is found in, or None."""
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size <= MAX_BYTES:
                data = file.read()
                return data if pattern.search(data) else None
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                if pattern.search(view) is None:
                    return None
        raise Unusable("too-large", f"it names a kernel and is larger than {MAX_BYTES >> 20} MiB")
    except OSError as error:
        raise _unreadable(error, path) from None


class Source:
    """A file's text, and where the positions of its syntax tree are in it."""

    def __init__(self, data):
        self.data = data
        self.mark = codecs.BOM_UTF8 if data.startswith(codecs.BOM_UTF8) else b""
        try:
            declared, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
            self.encoding = "utf-8" if declared == "utf-8-sig" else declared
            self.text = data[len(self.mark) :].decode(self.encoding)
        except (SyntaxError, UnicodeDecodeError, LookupError) as error:
            raise Unusable("not-text", f"not UTF-8, and no other encoding is declared that it is of: {error}") from None
        if self.encode(self.text) != data:
            raise Unusable("not-text", f"its {self.encoding} does not come back as it is")
        self.tree = parsed(self.text)
        self._starts = [0, *(end.end() for end in _LINE_END.finditer(self.text))]

    def encode(self, text):
        return self.mark + text.encode(self.encoding)

    def at(self, line, column):
        """The index in the text of a line, from 1 on, and a column in bytes of UTF-8."""
        start = self._starts[line - 1]
        characters = self.line(line)
        return start + (column if characters.isascii() else len(characters.encode()[:column].decode()))

    def line(self, line):
        """A line with its end."""
        return self.text[self._starts[line - 1] : self._starts[line] if line < len(self._starts) else len(self.text)]

    def line_start(self, line):
        return self._starts[line - 1]

    def span(self, node):
        return self.at(node.lineno, node.col_offset), self.at(node.end_lineno, node.end_col_offset)

    def of(self, node):
        start, end = self.span(node)
        return self.text[start:end]


def parsed(text):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        where = f"line {line}: " if line else ""
        raise Unusable("does-not-parse", f"{where}{getattr(error, 'msg', None) or error}") from None
    except (RecursionError, MemoryError) as error:
        raise Unusable("does-not-parse", f"nested too deeply: {type(error).__name__}") from None


def compiles(data, path):
    """Raises Unusable unless Python takes these bytes for a module."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(data, path, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Unusable("not-written", f"the result would not compile: {error}") from None


def write(path, before, after):
    """Puts ``after`` in place of ``before`` in one step, with the same mode; a link stays a link."""
    target = os.path.realpath(path)
    temporary = None
    try:
        with open(target, "rb") as file:
            status = os.fstat(file.fileno())
            if file.read() != before:
                raise Unusable("not-written", "it has changed since it was read")
        handle, temporary = tempfile.mkstemp(prefix=".epmoe-", dir=os.path.dirname(target))
        with open(handle, "wb") as file:
            file.write(after)
            file.flush()
            os.fsync(handle)
        with contextlib.suppress(PermissionError):
            os.chown(temporary, status.st_uid, status.st_gid)
        os.chmod(temporary, stat.S_IMODE(status.st_mode))
        os.replace(temporary, target)
        temporary = None
    except OSError as error:
        raise Unusable("not-written", error.strerror or type(error).__name__) from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
