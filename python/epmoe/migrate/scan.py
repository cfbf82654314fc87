"""Finds launches of SGLang's EP-MoE kernels in Python sources, and rewrites them to epmoe.shim's drop-in objects.

No file is imported or run: sources are read with :mod:`ast`. Files that nowhere mention the name of a kernel are not
parsed; that is asked of their bytes.
"""

import contextlib
import difflib
import json
import os
import re
import time
from dataclasses import asdict

from epmoe._shim.signatures import NAMES
from epmoe.errors import EpmoeError
from epmoe.migrate._scan import rewrite
from epmoe.migrate._scan.project import Project
from epmoe.migrate._scan.sites import Finder
from epmoe.migrate._scan.sources import Problem, Unusable, files_below, read, write

__all__ = ["scan", "scan_json"]

SCHEMA = "epmoe.scan/1"
ACTIONS = ("report", "write", "revert")
_NAMED = re.compile("|".join(sorted(NAMES)).encode())
_REWRITTEN = re.compile(rb"epmoe\.shim")


def scan(paths, *, action="report", diff=False, sglang=None):
    """What is launched where in these files and folders, as a dict that JSON holds.

    action: ``report``; ``write`` rewrites every site that nothing stands against; ``revert`` takes that back.
    diff: adds the changes, made or (with ``report``) possible, as unified diffs.
    sglang: the file with SGLang's kernels, or the folder of the package, that imports from ``sglang`` lead to where the
        scanned files do not define them; default: EPMOE_SGLANG, or an installed SGLang.

    Raises EpmoeError ``ERR_USAGE`` for a path that does not exist. Files that cannot be read or parsed are among the
    ``problems``, and the scan goes on.
    """
    paths = [os.fspath(path) for path in paths]
    _check(paths, action, sglang)
    begin = time.perf_counter()
    look = _Look(paths, sglang)
    changes = look.changes(action, diff)
    if any(change["written"] for change in changes):
        again = _Look(paths, sglang)
        again.problems += [each for each in look.problems if each.kind == "not-written"]
        look = again
    states = [site.state for site in look.sites]
    return {
        "schema": SCHEMA,
        "files": {"seen": look.seen, "parsed": len(look.files)},
        "seconds": round(time.perf_counter() - begin, 3),
        "sites": [site.plain() for site in look.sites],
        "problems": [asdict(problem) for problem in look.problems],
        "changes": changes,
        "summary": {state: states.count(state) for state in ("ready", "blocked", "migrated")},
    }


def scan_json(request):
    """The same from and to JSON, of ASCII alone, for the bridge."""
    return json.dumps(scan(**json.loads(request)))


def _check(paths, action, sglang):
    if not paths:
        raise _usage("paths", "files or folders", "none")
    for name, path in [*(("paths", path) for path in paths), *([("sglang", sglang)] if sglang is not None else [])]:
        if not os.path.lexists(path):
            raise _usage(name, "files or folders that exist", path)
    if action not in ACTIONS:
        raise _usage("action", ", ".join(ACTIONS), repr(action))


def _usage(argument, expected, received):
    return EpmoeError("ERR_USAGE", op="scan", argument=argument, expected=expected, received=received)


class _Look:
    """One pass over the files."""

    def __init__(self, paths, sglang):
        self.problems, self.files = [], []
        self.project = Project()
        self.project.use_sglang(sglang)
        every = {path: at for at, path in enumerate(files_below(paths, self.problems))}
        self.seen = len(every)
        unread = [path for path in every if not self._take(path)]
        self._take_aliases(unread)
        self.files.sort(key=lambda file: every[file.path])
        self.sites_of = {file.path: self._sites_in(file) for file in self.files}
        self.sites = [site for sites in self.sites_of.values() for site in sites]

    def _sites_in(self, file):
        try:
            return Finder(self.project, file).sites()
        except RecursionError:
            self.problems.append(Problem(file.path, "does-not-parse", "nested too deeply to be followed"))
            return []

    def _take(self, path):
        """Whether a file is done with: read, or given up."""
        try:
            data = read(path, _NAMED)
            if data is None:
                return False
            self.files.append(self.project.add(path, data))
        except Unusable as problem:
            self.problems.append(problem.problem(path))
        return True

    def _take_aliases(self, unread):
        """A kernel under a name of a module's own is found in the files that mention name and module."""
        known = set()
        while unread and (more := self.project.aliases() - known):
            known |= more
            pairs = [[re.compile(rb"\b%b\b" % re.escape(part).encode()) for part in pair] for pair in more]
            either = re.compile(b"|".join(name.pattern for name, _ in pairs))
            for path in list(unread):
                # What names no kernel and cannot be read is no loss.
                with contextlib.suppress(Unusable):
                    data = read(path, either)
                    if data and any(name.search(data) and module.search(data) for name, module in pairs):
                        unread.remove(path)
                        self.files.append(self.project.add(path, data))

    def changes(self, action, diff):
        if action == "revert":
            rewritten = [file for file in self.files if _REWRITTEN.search(file.source.data)]
            made = [(file.path, file.source, *rewrite.reverted(file.source)) for file in rewritten]
        elif action == "write" or diff:
            made = [each for file in self.files if (each := self._change(file)) is not None]
        else:
            made = []
        found = []
        for path, source, text, sites in made:
            if text == source.text:
                continue
            try:
                data = rewrite.check(source, text, path)
                if action != "report":
                    write(path, source.data, data)
            except Unusable as problem:
                self.problems.append(problem.problem(path))
                continue
            change = {"file": path, "sites": sites, "written": action != "report"}
            found.append(change | ({"diff": _diff(path, source.text, text)} if diff else {}))
        return found

    def _change(self, file):
        ready = [site for site in self.sites_of[file.path] if site.state == "ready"]
        if not ready:
            return None
        text, left = rewrite.rewritten(file, ready)
        for site in left:
            reason = f"line {site.line}: {site.callee} cannot be rewritten in place"
            self.problems.append(Problem(file.path, "not-written", reason))
        return file.path, file.source, text, len(ready) - len(left)


def _diff(path, before, after):
    lines = [re.findall(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+\Z", text) for text in (before, after)]
    found = []
    for line in difflib.unified_diff(*lines, path, path):
        found.append(line if line.endswith(("\n", "\r")) else f"{line}\n\\ No newline at end of file\n")
    return "".join(found)
