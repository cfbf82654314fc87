"""What names stand for in a file, by Python's rules of scope; the order of statements is not looked at.

A name's origins are all that is ever bound to it: something imported, defined here, None, or something else.
"""

import ast
from dataclasses import dataclass, replace

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
DROP_IN = "epmoe.shim.drop_in"


@dataclass(frozen=True)
class Imported:
    """``dotted`` is the path of modules and names, with leading dots where it is relative."""

    dotted: str
    statement: ast.stmt | None = None
    dropped_in: bool = False


@dataclass(frozen=True)
class Defined:
    node: ast.AST
    dropped_in: bool = False


@dataclass(frozen=True)
class Absent:
    """None"""


@dataclass(frozen=True)
class Other:
    line: int


@dataclass(frozen=True)
class _Value:
    expression: ast.expr
    scope: object


class Scope:
    def __init__(self, kind, node, parent=None):
        self.kind, self.node, self.parent = kind, node, parent
        self.names = {}
        self.outer = {}  # names declared global or nonlocal
        self.attributes = {}  # of a class, set through self

    def bind(self, name, what):
        self.names.setdefault(name, []).append(what)

    def inside(self, other):
        """Whether names of the other are seen here."""
        scope = self
        while scope is not None and scope is not other:
            scope = scope.parent
        return scope is other


class Bindings:
    """``scopes`` and ``parents`` of every node, ``followed``: values that are known by the names they are bound to.

    ``telling`` are names that say what they are, wherever they come from: as attributes of objects that nothing is
    known of (``?.name``), or bound by nothing in the file (``!.name``).
    """

    def __init__(self, tree, telling):
        self.tree, self._telling = tree, telling
        self.top = Scope("module", tree)
        self.scopes, self.parents = {}, {}
        self.followed = set()
        self.stars = []
        self._values = {}  # target of an assignment: its value, None where there is none
        self._all = [self.top]
        self._classes = {}
        stack = [(tree, self.top, None)]
        while stack:
            node, scope, parent = stack.pop()
            self.scopes[node], self.parents[node] = scope, parent
            stack.extend((child, inner, node) for child, inner in self._children(node, scope))
        self._declare_outer()

    # ------------------------------------------------------------ building

    def _children(self, node, scope):
        special = getattr(self, f"_{type(node).__name__}", None)
        found = None if special is None else special(node, scope)
        # The last comes off the stack first: in the order of the text, outer before inner.
        return reversed([(child, scope) for child in ast.iter_child_nodes(node)] if found is None else list(found))

    def _scope(self, kind, node, parent):
        scope = Scope(kind, node, parent)
        self._all.append(scope)
        return scope

    def _FunctionDef(self, node, scope):  # noqa: N802
        arguments = node.args
        inner = self._scope("function", node, scope)
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        every += [each for each in (arguments.vararg, arguments.kwarg) if each is not None]
        for each in every:
            inner.bind(each.arg, Other(node.lineno))
        outer = [*arguments.defaults, *(each for each in arguments.kw_defaults if each is not None)]
        outer += [each.annotation for each in every if each.annotation is not None]
        if isinstance(node, ast.Lambda):
            body = [node.body]
        else:
            scope.bind(node.name, Defined(node))
            outer += [*node.decorator_list, *([node.returns] if node.returns is not None else [])]
            body = node.body
        return [*((each, scope) for each in outer), *((each, inner) for each in body)]

    _AsyncFunctionDef = _Lambda = _FunctionDef

    def _ClassDef(self, node, scope):  # noqa: N802
        scope.bind(node.name, Defined(node))
        inner = self._classes[node] = self._scope("class", node, scope)
        outer = [*node.decorator_list, *node.bases, *node.keywords]
        return [*((each, scope) for each in outer), *((each, inner) for each in node.body)]

    def _ListComp(self, node, scope):  # noqa: N802
        inner = self._scope("comprehension", node, scope)
        first = node.generators[0].iter
        rest = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        for at, each in enumerate(node.generators):
            rest += [each.target, *([each.iter] if at else []), *each.ifs]
        return [(first, scope), *((each, inner) for each in rest)]

    _SetComp = _DictComp = _GeneratorExp = _ListComp

    def _Import(self, node, scope):  # noqa: N802
        for alias in node.names:
            name = alias.asname or alias.name.partition(".")[0]
            scope.bind(name, Imported(alias.name if alias.asname else name, node))

    def _ImportFrom(self, node, scope):  # noqa: N802
        module = "." * node.level + (node.module or "")
        for alias in node.names:
            dotted = module + ("" if module.endswith(".") else ".") + alias.name
            if alias.name == "*":
                self.stars.append(Imported(dotted.removesuffix("*"), node))
            else:
                scope.bind(alias.asname or alias.name, Imported(dotted, node))

    def _Global(self, node, scope):  # noqa: N802
        scope.outer.update(dict.fromkeys(node.names, "global"))

    def _Nonlocal(self, node, scope):  # noqa: N802
        scope.outer.update(dict.fromkeys(node.names, "nonlocal"))

    def _Assign(self, node, scope):  # noqa: N802
        for target in node.targets:
            self._pair(target, node.value)

    def _AnnAssign(self, node, scope):  # noqa: N802
        self._pair(node.target, node.value)

    def _NamedExpr(self, node, scope):  # noqa: N802
        self._pair(node.target, node.value)

    def _pair(self, target, value):
        if isinstance(target, (ast.Tuple, ast.List)) and isinstance(value, (ast.Tuple, ast.List)):
            starred = any(isinstance(each, ast.Starred) for each in (*target.elts, *value.elts))
            if not starred and len(target.elts) == len(value.elts):
                for each, part in zip(target.elts, value.elts, strict=True):
                    self._pair(each, part)
        elif isinstance(target, (ast.Name, ast.Attribute)):
            self._values[target] = value

    def _Name(self, node, scope):  # noqa: N802
        if not isinstance(node.ctx, ast.Store):
            return
        while scope.kind == "comprehension" and isinstance(self.parents[node], ast.NamedExpr):
            scope = scope.parent
        bound = self._bound(node, scope)
        if bound is not None:
            scope.bind(node.id, bound)

    def _Attribute(self, node, scope):  # noqa: N802
        owner = self._class_of_self(node.value, scope) if isinstance(node.ctx, ast.Store) else None
        bound = None if owner is None else self._bound(node, scope)
        if bound is not None:
            owner.attributes.setdefault(node.attr, []).append(bound)

    def _bound(self, target, scope):
        if target not in self._values:
            return Other(target.lineno)
        value = self._values[target]
        if value is None:  # an annotation binds nothing
            return None
        self.followed.add(value)
        return _Value(value, scope)

    def _ExceptHandler(self, node, scope):  # noqa: N802
        if node.name:
            scope.bind(node.name, Other(node.lineno))

    _MatchAs = _MatchStar = _ExceptHandler

    def _MatchMapping(self, node, scope):  # noqa: N802
        if node.rest:
            scope.bind(node.rest, Other(node.lineno))

    def _declare_outer(self):
        for scope in self._all:
            for name, kind in scope.outer.items():
                target = self.top
                if kind == "nonlocal":
                    target = scope.parent
                    while target.parent is not None and (target.kind != "function" or name not in target.names):
                        target = target.parent
                for what in scope.names.pop(name, []):
                    target.bind(name, what)

    # ------------------------------------------------------------ asking

    def _lookup(self, name, start):
        scope = start
        while scope is not None:
            if scope.outer.get(name) == "global":
                return self.top if name in self.top.names else None
            if name in scope.names and (scope.kind != "class" or scope is start):
                return scope
            scope = scope.parent
        return None

    def _class_of_self(self, node, scope):
        """The class whose method's first parameter this name is."""
        found = self._lookup(node.id, scope) if isinstance(node, ast.Name) else None
        if found is None or found.kind != "function" or found.parent.kind != "class":
            return None
        first = [*found.node.args.posonlyargs, *found.node.args.args][:1]
        return found.parent if first and first[0].arg == node.id else None

    def origins(self, node, known=None):
        """Everything that an expression may stand for, as far as bindings tell.

        ``known`` has the origins of names on the way, each looked up once; of one that is being looked up, those that
        need no further look.
        """
        known = {} if known is None else known
        scope = self.scopes[node]
        if isinstance(node, ast.Name):
            found = self._lookup(node.id, scope)
            if found is None:
                stars = [Imported(star.dotted + node.id, star.statement) for star in self.stars]
                return stars or self._by_name("!", node.id, node)
            return self._unfolded((found, node.id), found.names[node.id], known)
        if isinstance(node, ast.Attribute):
            return self._attribute(node, scope, known)
        if isinstance(node, ast.NamedExpr):
            return self.origins(node.value, known)
        if isinstance(node, (ast.IfExp, ast.BoolOp)):
            parts = [node.body, node.orelse] if isinstance(node, ast.IfExp) else node.values
            return [origin for part in parts for origin in self.origins(part, known)]
        if isinstance(node, ast.Constant) and node.value is None:
            return [Absent()]
        if isinstance(node, ast.Call):
            return self._call(node, known)
        return [Other(node.lineno)]

    def exported(self, name):
        """What a name of the module stands for."""
        return self._unfolded((self.top, name), self.top.names.get(name, []), {})

    def _unfolded(self, key, bound, known):
        if key not in known:
            known[key] = [each for each in bound if not isinstance(each, _Value)]
            found = {}
            for each in bound:
                found.update(
                    dict.fromkeys(self.origins(each.expression, known) if isinstance(each, _Value) else [each])
                )
            known[key] = list(found)
        return known[key]

    def _attribute(self, node, scope, known):
        owner = self._class_of_self(node.value, scope)
        if owner is not None and (node.attr in owner.attributes or node.attr in owner.names):
            bound = [*owner.attributes.get(node.attr, []), *owner.names.get(node.attr, [])]
            return self._unfolded((owner, "self", node.attr), bound, known)
        found = []
        for origin in self.origins(node.value, known):
            if isinstance(origin, Imported):
                found.append(Imported(f"{origin.dotted}.{node.attr}", origin.statement))
            elif isinstance(origin, Defined) and isinstance(origin.node, ast.ClassDef):
                inner = self._classes[origin.node]
                found += self._unfolded((inner, node.attr), inner.names.get(node.attr, [Other(node.lineno)]), known)
            elif not isinstance(origin, Absent):
                found += self._by_name("?", node.attr, node)
        return found

    def _by_name(self, prefix, name, node):
        return [Imported(f"{prefix}.{name}") if name in self._telling else Other(node.lineno)]

    def _call(self, node, known):
        called = node.func
        plain = isinstance(called, ast.Name) or getattr(called, "attr", "") in ("drop_in", "import_module")
        if not plain or len(node.args) != 1 or node.keywords:
            return [Other(node.lineno)]
        origins, argument = self.origins(called, known), node.args[0]
        if self.is_drop_in(origins):
            return [
                replace(each, dropped_in=True) if isinstance(each, (Imported, Defined)) else each
                for each in self.origins(argument, known)
            ]
        loads = any(isinstance(each, Imported) and each.dotted == "importlib.import_module" for each in origins)
        if loads and isinstance(argument, ast.Constant):
            return [Imported(str(argument.value))]
        return [Other(node.lineno)]

    @staticmethod
    def is_drop_in(origins):
        return bool(origins) and all(isinstance(each, Imported) and each.dotted == DROP_IN for each in origins)
