"""The ops as torch.library ops: ``torch.ops.epmoe.post_reorder`` and the others, for ``torch.compile`` and tracing.

Importing this module registers them. Each op of the library has an op ``epmoe::<name>`` that writes to its outputs and
returns nothing; its schema is made from the op's descriptor, required arguments first, as in :mod:`epmoe.generated`. An
op with one required output whose shape follows from the inputs has in addition ``epmoe::<name>_functional``, which
makes that output and returns it. ``FUNCTIONAL`` names those. All are offered here under their own names, too.

Errors are :class:`EpmoeError` when an op runs; while one is traced, shapes are not checked.
"""

import torch

from epmoe import _library as c
from epmoe._call import invoke
from epmoe.errors import EpmoeError

_DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.float64,
)
_ROLE_OUT = 1
# Kernels take what is contiguous: a compiler must not lay tensors out anew.
_TAGS = (getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order),)

_torch_library = torch.library.Library("epmoe", "FRAGMENT")


class _Param:
    def __init__(self, param):
        self.name = param.name.decode()
        self.kind = param.kind
        self.optional = bool(param.optional)
        self.is_tensor = param.kind == c.KIND_TENSOR
        self.is_output = self.is_tensor and param.role == _ROLE_OUT
        self.shape = (param.shape or b"").decode()
        self.dtypes = [dtype for bit, dtype in enumerate(_DTYPES) if param.dtypes >> bit & 1]
        self.dtype_like = param.dtype_like
        self.default = self._default(param)

    def _default(self, param):
        if self.is_tensor or not self.optional:
            return None
        if self.kind == c.KIND_ENUM:
            return param.choices[int(param.default_value)].decode()
        return int(param.default_value) if self.kind == c.KIND_INT else float(param.default_value)

    def declared(self, alias=""):
        """The argument as a schema spells it."""
        kind = {c.KIND_TENSOR: f"Tensor{alias}", c.KIND_INT: "SymInt", c.KIND_FLOAT: "float", c.KIND_ENUM: "str"}
        text = kind[self.kind]
        if not self.optional:
            return f"{text} {self.name}"
        if self.is_tensor:
            return f"{text}? {self.name}=None"
        default = f'"{self.default}"' if self.kind == c.KIND_ENUM else repr(self.default)
        return f"{text} {self.name}={default}"


class _Op:
    def __init__(self, info):
        self.name = info.name.decode()
        self.params = [_Param(info.params[i]) for i in range(info.n_params)]
        ordered = sorted(self.params, key=lambda param: param.optional)
        self.ordered = ordered
        self.order = [ordered.index(param) for param in self.params]  # from the schema's order to the descriptor's
        self.made = self._made()

    def _made(self):
        """The output that a functional variant can make, or None."""
        required = [param for param in self.params if param.is_output and not param.optional]
        if len(required) != 1:
            return None
        known = set()
        for param in self.params:
            if param.is_tensor and not param.is_output and not param.optional:
                for alternative in param.shape.split("|"):
                    known.update(map(_axis, filter(_is_simple, alternative.split(","))))
        return required[0] if set(map(_axis, required[0].shape.split(","))) <= known else None

    def register(self):
        aliases = iter("abcdefghijklmnop")
        arguments = [p.declared(f"({next(aliases)}!)" if p.is_output else "") for p in self.ordered]
        self._define(self.name, f"({', '.join(arguments)}) -> ()", self.run, lambda *args: None)
        if self.made is None:
            return [self.name]
        arguments = [p.declared() for p in self.ordered if not p.is_output]
        if self.made.dtypes:
            arguments.append("ScalarType? dtype=None")
        name = f"{self.name}_functional"
        self._define(name, f"({', '.join(arguments)}) -> Tensor", self.run_functional, self.make)
        return [self.name, name]

    def _define(self, name, schema, run, fake):
        _torch_library.define(name + schema, tags=_TAGS)
        names = [argument.name for argument in torch._C.parse_schema(f"epmoe::{name}{schema}").arguments]
        defaults = {p.name: p.default for p in self.params}

        def positional(function):
            def call(*args, **kwargs):
                rest = (kwargs.pop(each) if each in kwargs else defaults.get(each) for each in names[len(args) :])
                return function(*args, *rest)

            call.__name__ = call.__qualname__ = name
            return call

        for device in ("CPU", "CUDA"):
            _torch_library.impl(name, positional(run), device)
        torch.library.register_fake(f"epmoe::{name}", positional(fake), lib=_torch_library)

    def run(self, *values):
        invoke(self.name, [values[at] for at in self.order])

    def _spread(self, values):
        """The values of a functional call by name, and the dtype asked for."""
        inputs = [param.name for param in self.ordered if not param.is_output]
        dtype = values[len(inputs)] if self.made.dtypes else None
        return dict(zip(inputs, values, strict=False)), dtype

    def make(self, *values):
        """The output, not yet written to; where rows may be left out, they are zeros."""
        given, dtype = self._spread(values)
        sizes = {}
        for param in self.params:
            value = given.get(param.name)
            if param.is_tensor and value is not None:
                _bind(param.shape, value.shape, sizes)
        like = given[self.params[self.made.dtype_like].name]
        shape = []
        for text in self.made.shape.split(","):
            if _axis(text) not in sizes:
                raise EpmoeError(
                    "ERR_SHAPE",
                    op=f"{self.name}_functional",
                    expected=f"an input that says how long {_axis(text)} is",
                    received="flat tables only",
                    hint="Pass the slots as [T, K]",
                )
            found = sizes[_axis(text)]
            shape += found if isinstance(found, (list, tuple)) else [found]
        make = like.new_zeros if "..." in self.made.shape else like.new_empty
        return make(shape, dtype=dtype or like.dtype)

    def run_functional(self, *values):
        given, _ = self._spread(values)
        given[self.made.name] = output = self.make(*values)
        invoke(self.name, [given.get(param.name, param.default) for param in self.params])
        return output


def _is_simple(text):
    """Whether an axis is one number, given the size: ``H``, ``2*I``, ``E+1`` and ``...R``, but not ``T*K``."""
    left, times, _ = text.partition("*")
    return not times or left.isdecimal()


def _axis(text):
    return text.partition("*")[2] if text[0].isdecimal() else text.partition("+")[0]


def _bind(spec, shape, sizes):
    """Reads the lengths of axes off a tensor; leading axes (``...R``) are kept as a list."""
    for alternative in spec.split("|"):
        axes = alternative.split(",")
        leading = axes[0].startswith("...")
        if len(shape) != len(axes) and not (leading and len(shape) > len(axes)):
            continue
        tail = list(shape[len(shape) - len(axes) + 1 :]) if leading else list(shape)
        if leading:
            sizes.setdefault(axes[0], list(shape[: len(shape) - len(axes) + 1]))
            axes = axes[1:]
        for text, size in zip(axes, tail, strict=True):
            if _is_simple(text):
                factor, times, _ = text.partition("*")
                plus = text.partition("+")[2]
                length = size // int(factor) if times else size - int(plus) if plus else size
                sizes.setdefault(_axis(text), length)
        return


def _ops():
    index = 0
    while info := c.library().epmoe_op_at(index):
        yield _Op(info.contents)
        index += 1


def _register():
    names = [name for op in _ops() for name in op.register()]
    for name in names:
        globals()[name] = getattr(torch.ops.epmoe, name)
    return names


__all__ = _register()
FUNCTIONAL = [name.removesuffix("_functional") for name in __all__ if name.endswith("_functional")]
__all__ += ["FUNCTIONAL"]
