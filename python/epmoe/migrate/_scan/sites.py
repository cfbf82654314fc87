"""Where a file launches kernels, calls helpers or hands them on, and what stands against rewriting that."""

import ast
import inspect
from dataclasses import dataclass, field

from epmoe._shim.signatures import HELPERS, KERNELS, OPTIONS, form_of_names, forms_by_call
from epmoe.migrate._scan.bindings import Absent, Imported, Other
from epmoe.migrate._scan.project import MOVED, Meaning, is_jit

_GUARDS = (ast.Compare, ast.UnaryOp, ast.Assert, ast.Expr, ast.Delete)
_FORMATTED = ("JoinedStr", "TemplateStr")
_LONGEST = 200


@dataclass
class Site:
    """``node`` is the expression that stands for the kernel, ``origins`` all it may stand for."""

    file: str
    line: int
    column: int
    kernel: str
    kind: str  # launch, call, partial, value
    callee: str
    module: str
    definition: str
    op: str
    generation: str
    arguments: list
    state: str  # ready, blocked, migrated
    blockers: list
    notes: list
    node: ast.expr = field(repr=False)
    origins: list = field(repr=False)

    def plain(self):
        return {name: value for name, value in vars(self).items() if name not in ("node", "origins")}


@dataclass(frozen=True)
class Use:
    kind: str
    node: ast.expr
    call: ast.Call | None = None
    grid: ast.expr | None = None
    dropped_in: bool = False


class Finder:
    def __init__(self, project, file):
        self.project, self.file = project, file
        self.bindings, self.source = file.bindings, file.source

    def sites(self):
        found = {}
        for node in self.bindings.scopes:
            if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load):
                origins = self.bindings.origins(node)
                if self.project.meanings(origins, self.file):
                    use = self._use(node)
                    if use is not None and use.node not in found:
                        found[use.node] = self._site(use)
        return sorted((each for each in found.values() if each), key=lambda each: (each.line, each.column))

    # ------------------------------------------------------------ uses

    def _use(self, node):
        """How a kernel is used; None where that launches nothing that is not seen elsewhere."""
        parents = self.bindings.parents
        node, parent = self._climbed(node)
        dropped_in = isinstance(parent, ast.Call) and node in parent.args and self._drops_in(parent)
        if dropped_in:
            node, parent = self._climbed(parent)
        if node in self.bindings.followed or isinstance(parent, _GUARDS) or self._is_test(node, parent):
            return None
        above = parents[parent] if parent is not None else None
        if isinstance(parent, ast.Subscript) and parent.value is node:
            if isinstance(above, ast.Call) and above.func is parent:
                return Use("launch", node, above, parent.slice, dropped_in)
            if self._is_partial(above, parent):
                return Use("partial", node, above, parent.slice, dropped_in)
            return Use("value", node, dropped_in=dropped_in)
        if isinstance(parent, ast.Call) and parent.func is node:
            return Use("call", node, parent, None, dropped_in)
        if isinstance(parent, ast.Attribute):
            launched = parent.attr == "run" and isinstance(above, ast.Call) and above.func is parent
            return Use("launch", node, above, None, dropped_in) if launched else None
        if self._is_partial(parent, node):
            return Use("partial", node, parent, None, dropped_in)
        return Use("value", node, dropped_in=dropped_in)

    def _climbed(self, node):
        """Out of choices between kernels: ``a if new else b``."""
        parent = self.bindings.parents[node]
        while (isinstance(parent, ast.IfExp) and parent.test is not node) or isinstance(
            parent, (ast.BoolOp, ast.NamedExpr)
        ):
            if isinstance(parent, ast.NamedExpr):
                self.bindings.followed.discard(node)
            node, parent = parent, self.bindings.parents[parent]
        return node, parent

    @staticmethod
    def _is_test(node, parent):
        return isinstance(parent, (ast.If, ast.While, ast.IfExp)) and parent.test is node

    def _drops_in(self, call):
        return self.bindings.is_drop_in(self.bindings.origins(call.func))

    def _is_partial(self, call, node):
        if not isinstance(call, ast.Call) or call.args[:1] != [node]:
            return False
        return any(
            isinstance(each, Imported) and each.dotted == "functools.partial"
            for each in self.bindings.origins(call.func)
        )

    # ------------------------------------------------------------ sites

    def _site(self, use):
        origins = self.bindings.origins(use.node)
        meanings = list(dict.fromkeys(self.project.meanings(origins, self.file)))
        kernels = sorted({each.kernel for each in meanings})
        kernel = kernels[0]
        if use.kind == "call" and kernel in KERNELS:
            return None  # device code calls a kernel so; on the host it cannot be done
        blockers, notes = self._standing_against(use, origins, kernels), []
        generations, form, arguments = [], None, []
        if use.kind in ("launch", "call"):
            for meaning in meanings:
                matched = Match(self.source, use, meaning)
                generations += matched.generations
                blockers += matched.blockers
                notes += matched.notes
                if matched.form is not None and form is None:
                    form, arguments = matched.form, matched.arguments
        start, _ = self.source.span(use.node)
        line = self.source.line_start(use.node.lineno)
        migrated = use.dropped_in or any(each.migrated for each in meanings)
        blockers = [dict(each) for each in dict.fromkeys(tuple(each.items()) for each in blockers)]
        if migrated:
            notes, blockers = [*notes, *(each["reason"] for each in blockers)], []
        return Site(
            file=self.file.path,
            line=use.node.lineno,
            column=start - line + 1,
            kernel=" or ".join(kernels),
            kind=use.kind,
            callee=self._text(use.node),
            module=" or ".join(dict.fromkeys(each.module for each in meanings if each.module.strip("?!"))),
            definition=" or ".join(dict.fromkeys(each.definition.file for each in meanings if each.definition)),
            op=form.op if form else (KERNELS[kernel][0] if kernel in KERNELS else HELPERS[kernel]).op,
            generation=" or ".join(sorted({*generations} - {""})),
            arguments=arguments,
            state="migrated" if migrated else "blocked" if blockers else "ready",
            blockers=blockers,
            notes=list(dict.fromkeys(notes)),
            node=use.node,
            origins=origins,
        )

    def _text(self, node):
        return _short(self.source.of(node))

    def _standing_against(self, use, origins, kernels):
        blockers = []
        if use.kind == "value":
            blockers.append(_blocker("taken-as-value", "handed on as a value: where it is launched is not seen"))
        if use.kind == "partial":
            blockers.append(_blocker("partial", "functools.partial binds some of its arguments, the rest is not seen"))
        if len(kernels) > 1:
            blockers.append(_blocker("several-kernels", f"it may be any of {', '.join(kernels)}"))
        for each in origins:
            if isinstance(each, Other):
                blockers.append(_blocker("rebound", f"its name is bound to something else too, at line {each.line}"))
            elif not isinstance(each, Absent) and not self.project.meanings([each], self.file):
                blockers.append(_blocker("rebound", "its name is bound to something else too"))
            elif isinstance(each, Imported) and each.dotted.startswith("!."):
                blockers.append(_blocker("unbound", "nothing in this file binds its name"))
        node = use.node
        while (node := self.bindings.parents[node]) is not None:
            if type(node).__name__ in _FORMATTED:
                blockers.append(_blocker("f-string", "it stands in an f-string"))
            if isinstance(node, ast.FunctionDef) and is_jit(node):
                blockers.append(_blocker("device-code", f"it stands in the kernel {node.name}"))
        grid = use.grid
        if isinstance(grid, ast.Tuple) and any(_constant(each) != 1 for each in grid.elts[1:]):
            blockers.append(_blocker("grid", "its grid has more than one axis"))
        return blockers


class Match:
    """One call beside what is known of one kernel."""

    def __init__(self, source, use, meaning: Meaning):
        self.source, self.use, self.meaning = source, use, meaning
        self.generations, self.blockers, self.notes = [], [], []
        self.form, self.arguments, self.bound = None, [], {}
        call = use.call
        through_run = use.kind == "launch" and use.grid is None
        skipped = (OPTIONS if use.kind == "launch" else set()) | ({"grid", "warmup"} if through_run else set())
        self.positional = call.args
        self.keywords = {each.arg: each.value for each in call.keywords if each.arg not in skipped}
        self.starred = None in self.keywords or any(isinstance(each, ast.Starred) for each in call.args)
        if through_run and any(each.arg == "warmup" and _constant(each.value) is not False for each in call.keywords):
            self.notes.append("warmup only compiles")
        if meaning.kernel in KERNELS:
            self._kernel()
        else:
            self._helper()

    def _block(self, code, reason):
        self.blockers.append(_blocker(code, reason))

    def _kernel(self):
        definition, kernel = self.meaning.definition, self.meaning.kernel
        names = None
        if definition is not None:
            names = definition.names
            form = None if names is None else form_of_names(kernel, names, lambda: definition.text)
            if form is None:
                told = ", ".join(names or ["*"])
                self._block("unknown-signature", f"its signature in {definition.file} is not known: {told}")
                return
            forms = [form]
        elif not self.starred:
            forms = forms_by_call(kernel, len(self.positional), set(self.keywords))
            if self.meaning.module == MOVED:
                forms = [form for form in forms if not form.refused] or forms
            if not forms:
                by_name = ", ".join(sorted(self.keywords)) or "none"
                self._block(
                    "unknown-signature",
                    f"{len(self.positional)} positional arguments and {by_name} by name fit no signature that is known",
                )
                return
        else:
            forms = []
        self.generations = [form.generation for form in forms]
        if len(forms) > 1:
            self._block("generation-unknown", _alike(forms))
        elif forms and forms[0].refused:
            self._block("known-wrong", forms[0].refused)
        if self.starred:
            self._block("star-arguments", "* or ** arguments: what it is called with is not seen")
        elif forms:
            self._bind(forms[0], names or forms[0].names, definition.defaults if definition else frozenset())

    def _helper(self):
        helper, definition = HELPERS[self.meaning.kernel], self.meaning.definition
        if definition is not None and (definition.names is None or not helper.fits(definition.names)):
            told = ", ".join(definition.names or ["*"])
            self._block("unknown-signature", f"its signature in {definition.file} is not known: {told}")
            return
        if self.starred:
            self._block("star-arguments", "* or ** arguments: what it is called with is not seen")
            return
        names = definition.names if definition else (*helper.names, *helper.may)
        further = frozenset(names[len(helper.names) :])
        self._bind(helper, names, further if definition is None else definition.defaults)
        for name in further & self.bound.keys():
            value = self.bound[name]
            taken = helper.may.get(name, (False,))
            if not isinstance(value, ast.Constant):
                if taken != (False, True):
                    self.notes.append(f"goes to Triton where {name} is other than {' or '.join(map(str, taken))}")
            elif value.value is not None and value.value not in taken:
                self._block("refused-value", f"epmoe does not take {name}={value.value!r}")

    def _bind(self, form, names, defaults):
        """Arguments to parameters, as Python does; ``names`` are the parameters as this version spells them."""
        positional, keywords = self.positional, self.keywords
        if len(positional) > len(names):
            self._block("arguments", f"{len(positional)} positional arguments for {len(names)} parameters")
            return
        bound = self.bound = dict(zip(names, positional, strict=False))
        for name, value in keywords.items():
            if name not in names:
                self._block("arguments", f"it has no parameter {name}")
            elif name in bound:
                self._block("arguments", f"{name} is given twice")
            else:
                bound[name] = value
        missing = [name for name in names if name not in bound and name not in defaults]
        if missing:
            self._block("arguments", f"no {', '.join(missing)}")
        self.form = form
        own = dict(zip(names, form.names, strict=False))
        for name in names:
            if name in bound:
                known = own.get(name, name)
                self.arguments.append(
                    {
                        "parameter": name,
                        "argument": form.arguments.get(known),
                        "value": _short(self.source.of(bound[name])),
                    }
                )


def _alike(forms):
    refused = next(form for form in forms if form.refused)
    names = " and ".join(sorted(form.generation for form in forms))
    return (
        f"generations {names} are launched alike, and {refused.generation} drops an expert: "
        "scan the file that defines it too, or name its SGLang with --sglang"
    )


def _blocker(code, reason):
    return {"code": code, "reason": reason}


def _constant(node):
    return node.value if isinstance(node, ast.Constant) else inspect.Parameter.empty


def _short(text):
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…"
