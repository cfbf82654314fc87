"""The rewrite and its way back: ``kernel[grid](...)`` becomes ``drop_in(kernel)[grid](...)``.

Nothing is taken out of a file: the rewrite adds ``drop_in(`` and ``)`` around the expression that stands for a kernel,
and ``from epmoe.shim import drop_in`` beside each import that the kernel comes from, in the same block. So the way back
is told by the file itself, whatever else has been edited in it meanwhile.
"""

import ast
import collections
import re

from epmoe.migrate._scan.bindings import Absent, Imported
from epmoe.migrate._scan.sources import Unusable, compiles

_NAME = "drop_in"
_MODULE = "epmoe.shim"
_REST = re.compile(r"[ \t\f]*(#[^\r\n]*)?(\r\n|\r|\n|\Z)")


def rewritten(file, sites):
    """The file's text with these sites rewritten, and those that cannot be rewritten in place."""
    name = _name(file)
    statement = f"from {_MODULE} import {_NAME}" + ("" if name == _NAME else f" as {name}")
    inserted, taken, left = [], [], []
    for site in sites:
        start, end = file.source.span(site.node)
        if _is_whole(file.source.text[start:end], site.node):
            inserted += [(start, f"{name}("), (end, ")")]
            taken.append(site)
        else:
            left.append(site)
    inserted += _imports(file, taken, name, statement)
    return _changed(file.source.text, [(at, at, added) for at, added in inserted]), left


def reverted(source):
    """The text without what :func:`rewritten` adds, and how many sites that were."""
    imports = {}
    for node in ast.walk(source.tree):
        if _is_import(node):
            span = _import_span(source, node)
            if span is not None:
                imports.setdefault(node.names[0].asname or _NAME, []).append((*span, ""))
    removed, sites = [], collections.Counter()
    uses = collections.Counter(node.id for node in ast.walk(source.tree) if isinstance(node, ast.Name))
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in imports:
            (start, end), inner = source.span(node), [source.span(each) for each in node.args]
            if len(inner) != 1 or node.keywords:
                continue
            (first, last) = inner[0]
            # A formatter may have put it on lines of its own.
            around = source.text[start:first] + source.text[last:end]
            if re.fullmatch(rf"{node.func.id}\(\s*,?\s*\)", around):
                removed += [(start, first, ""), (last, end, "")]
                sites[node.func.id] += 1
    for name, spans in imports.items():
        if uses[name] == sites[name]:
            removed += spans
    return _changed(source.text, removed), sites.total()


def _changed(text, edits):
    """Of two edits at one index, the later in the list comes out first."""
    for start, end, new in sorted(edits, key=lambda each: each[0], reverse=True):
        text = text[:start] + new + text[end:]
    return text


def _is_import(node):
    """Whether this is an import of drop_in and nothing else, as the rewrite makes it."""
    return (
        isinstance(node, ast.ImportFrom)
        and node.module == _MODULE
        and not node.level
        and [alias.name for alias in node.names] == [_NAME]
    )


def check(source, text, path):
    """Raises Unusable unless the new text compiles and leads back to the old one byte for byte."""
    data = source.encode(text)
    compiles(data, path)
    back, _ = reverted(type(source)(data))
    before, _ = reverted(source)
    if back != before:
        raise Unusable("not-written", "the way back would not lead to the same bytes")
    return data


def _name(file):
    """The name that drop_in has or can have in a file."""
    for node in ast.walk(file.source.tree):
        if _is_import(node):
            return node.names[0].asname or _NAME
    taken = set(re.findall(r"\w*drop_in\w*", file.source.text))
    return next(name for name in (_NAME, *(f"epmoe_{_NAME}{'_' * n}" for n in range(99))) if name not in taken)


def _is_whole(text, node):
    """Whether this text is the expression: positions inside f-strings are wrong before Python 3.12."""
    try:
        return ast.dump(ast.parse(f"({text}\n)", mode="eval").body) == ast.dump(node)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _imports(file, sites, name, statement):
    """The insertions of the imports that these sites need: one a block."""
    first = {}
    for site in sites:
        for place in _anchors(file, site, name):
            block = place[0]
            first[block] = min(first.get(block, place), place, key=lambda each: each[1])
    found = []
    for _, _, anchor in first.values():
        at, before, after = _ahead(file.source) if anchor is None else _behind(file.source, anchor)
        found.append((at, before + statement + after))
    return found


def _anchors(file, site, name):
    """Beside each import of the kernel, or else behind the file's first ones: (block, position, statement before it).

    None for the statement stands for the beginning of the module.
    """
    bindings = file.bindings
    scope = bindings.scopes[site.node]
    found = []
    for origin in site.origins:
        statement = origin.statement if isinstance(origin, Imported) else None
        if isinstance(origin, Absent):
            continue
        if statement is None or not _is_seen(bindings, statement, scope, name):
            return _at_the_top(file.source.tree.body, name)
        block = _block_of(bindings.parents[statement], statement)
        if not any(_is_there(each, name) for each in block):
            found.append((id(block), block.index(statement), statement))
    return found


def _at_the_top(body, name):
    """Behind the imports that a module begins with."""
    if any(_is_there(each, name) for each in body):
        return []
    last = -1
    for at, statement in enumerate(body):
        documents = at == 0 and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        if not documents and not isinstance(statement, (ast.Import, ast.ImportFrom)):
            break
        last = at
    return [(id(body), last, body[last] if last >= 0 else None)]


def _behind(source, statement):
    """Where and within what to insert: a line of its own where the statement has one, else after a semicolon."""
    end = source.at(statement.end_lineno, statement.end_col_offset)
    indent, own_line = _indentation(source, statement)
    rest = _REST.match(source.text, end)
    if not own_line or rest is None:
        return end, "; ", ""
    if rest.group(2):
        return rest.end(), indent, rest.group(2)
    return rest.end(), _line_end(source) + indent, ""


def _ahead(source):
    """At the beginning of the line of a module's first statement."""
    first = source.tree.body[0]
    line = min(each.lineno for each in (first, *getattr(first, "decorator_list", [])))
    return source.line_start(line), "", _line_end(source)


def _is_seen(bindings, statement, scope, name):
    own = bindings.scopes[statement]
    declared = {alias.asname or alias.name.partition(".")[0] for alias in statement.names} & own.outer.keys()
    parent = bindings.parents[statement]
    checked = isinstance(parent, ast.If) and "TYPE_CHECKING" in ast.dump(parent.test)
    return own.kind in ("module", "function") and scope.inside(own) and not declared and not checked


def _block_of(parent, statement):
    """The list of statements that one is in."""
    blocks = [value for _, value in ast.iter_fields(parent) if isinstance(value, list)]
    return next(block for block in blocks if statement in block)


def _is_there(statement, name):
    return (
        isinstance(statement, ast.ImportFrom)
        and statement.module == _MODULE
        and any(alias.name == _NAME and (alias.asname or _NAME) == name for alias in statement.names)
    )


def _indentation(source, statement):
    """What stands before a statement on its line, and whether the line is its own."""
    start = source.at(statement.lineno, statement.col_offset)
    before = source.text[source.line_start(statement.lineno) : start]
    continued = statement.lineno > 1 and source.line(statement.lineno - 1).rstrip("\r\n").endswith("\\")
    # A form feed begins a line's indentation anew.
    return before.rpartition("\f")[2], not before.strip(" \t\f") and not continued


def _line_end(source):
    found = re.search(r"\r\n|\r|\n", source.text)
    return found.group() if found else "\n"


def _import_span(source, node):
    """What to take out for an import that the rewrite put there; None for another."""
    start, end = source.span(node)
    before, own_line = _indentation(source, node)
    rest = re.compile(r"\r\n|\r|\n|\Z").match(source.text, end)
    if own_line and rest is not None:
        line = source.line_start(node.lineno)
        if rest.group() or line == 0:
            return line, rest.end()
        ended = re.compile(r"(\r\n|\r|\n)\Z").search(source.text[:line])
        return ended.start(), end
    if before.endswith("; "):
        return start - 2, end
    return None
