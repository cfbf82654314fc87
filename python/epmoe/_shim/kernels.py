"""The objects that stand where Triton's kernels and SGLang's helpers stood."""

import functools
import inspect
import math
import operator
import threading
import warnings

from torch import Tensor

from epmoe import sglang_original
from epmoe._shim import capture, helpers, shadow
from epmoe._shim.control import Sampler, controls, recorder, timed
from epmoe._shim.forms import TRANSLATE, Refused, form_by_call, form_of
from epmoe._shim.signatures import HELPERS, KERNELS, OPTIONS
from epmoe.errors import EpmoeError
from epmoe.migrate import capsule as capsules

_NO_ORIGINAL = "Install an SGLang that has it, name one in EPMOE_SGLANG, or set the mode to 'epmoe'"
_LAST_POINTER = 4  # of a kernel's parameters
_NO_TENSOR = ("hidden_size", "scales", "a1_scales_ptr")  # of those up to there; scales may also be absent
_dtype = operator.attrgetter("dtype")


def shape_of(args, kwargs):
    """What tells calls apart for sampling, where nothing is known of their parameters."""
    values = (*args, *kwargs.values())
    return tuple((each.shape, each.dtype) if isinstance(each, Tensor) else type(each) for each in values)


class Shim:
    """What both kinds share: ``_describe`` tells a call to epmoe, ``_launch_original`` leaves it to Triton, ``_shape``
    tells it apart from others for sampling."""

    def __init__(self, name, original=None):
        self.__name__ = self.__qualname__ = name
        self._control = controls[name]
        self._original = original
        self._finding = threading.Lock()

    def original(self):
        """What was there; where nothing was, an installed SGLang's."""
        if self._original is None:
            with self._finding:
                if self._original is None:
                    found = sglang_original.find()
                    problem = found.problem_of(self.__name__)
                    if problem:
                        raise EpmoeError(
                            "ERR_NO_ORIGINAL",
                            op=f"shim.{self.__name__}",
                            expected="the Triton original, to serve it",
                            received=problem,
                            hint=_NO_ORIGINAL,
                        )
                    self._original = found.kernel(self.__name__)
        return self._original

    def _serve(self, call):
        """``call`` is the grid, if there is one, the arguments and the keyword arguments. Most launches are only
        counted, and what is done for that costs serving."""
        control = self._control
        mode = control.mode
        if mode == "off":
            return self._launch_original(*call)
        if shadow.pending:
            shadow.poll()
        if recorder.ring is not None and control.recording.wants(self._shape, call):
            return self._recorded(call)
        if mode == "epmoe":
            return self._own(call)
        if mode == "shadow":
            if shadow.capturing():
                return self._captured(call)
            sampler = control.sampler
            if sampler.first > 0 and sampler.is_first(self._shape(*call)):
                return self._compared(call)
            if sampler.by_chance() and not control.puts_off():
                return self._compared(call)
        return self._triton(call)

    def _triton(self, call):
        result = self._launch_original(*call)
        self._control.by_triton.up()
        return result

    def _own(self, call):
        control, described = self._control, None
        try:
            _, described, _ = self._describe(*call)
            result = described.run()
        except Exception as error:
            # Of an index out of range epmoe skips the slot and says so; Triton would read or write out of bounds.
            beyond = isinstance(error, EpmoeError) and error.code == "ERR_INDEX_OUT_OF_RANGE"
            beyond = beyond and described is not None and described.written()
            if beyond or control.strict:
                control.refused.up()
                raise _refusal(self.__name__, error) from error
            control.fell_back(_key(error), _told(error))
            return self._triton(call)
        control.by_epmoe.up()
        return result

    def _captured(self, call):
        """In shadow under graph capture: what is sampled is compared at each replay."""
        control, stage = self._control, None
        control.count("captured")
        if control.sampler.wants(self._shape, call):
            with timed(control, "shadow"):
                try:
                    generation, described, launch = self._describe(*call)
                    stage = capture.Stage(control, described, generation, launch)
                    stage.before()
                except Exception as error:
                    stage = None
                    shadow.captured(control, _told(error))
        result = self._triton(call)
        if stage is not None:
            with timed(control, "shadow"):
                try:
                    stage.after(result)
                    control.count("staged")
                except Exception as error:
                    shadow.captured(control, _told(error))
        return result

    def _compared(self, call):
        control = self._control
        sample = None
        with timed(control, "shadow"):
            try:
                generation, described, launch = self._describe(*call)
                sample = shadow.Sample(control, described, generation, launch)
                if sample.device.type == "cuda":
                    capture.prepare(sample.device)
            except Exception as error:
                self._not_compared(error)
        if sample is None:
            return self._triton(call)
        with sample.timed() as sample.triton:
            result = self._triton(call)
        with timed(control, "shadow"):
            control.count("sampled")
            try:
                sample.finish(result)
            except Exception as error:
                self._not_compared(error, launch)
        return result

    def _not_compared(self, error, launch=None):
        if isinstance(error, Refused) or (isinstance(error, EpmoeError) and error.code in _REFUSALS):
            self._control.fell_back(_key(error), _told(error), "uncovered")
        else:
            shadow.failed(self._control, error, launch)

    def _recorded(self, call):
        """Serves as the mode says but without sampling, and writes what went in and what came out."""
        control = self._control
        if shadow.capturing():
            control.count("captured")
            shadow.captured(control, "what a graph replays is not recorded, but for mismatches in shadow")
            return self._own(call) if control.mode == "epmoe" else self._triton(call)
        made = None
        with timed(control, "record"):
            try:
                made = self._capsule_before(*self._describe(*call))
            except Exception as error:
                control.fell_back(_key(error), _told(error), "record_failures")
        result = self._own(call) if control.mode == "epmoe" else self._triton(call)
        if made is not None:
            capsule, described = made
            with timed(control, "record"):
                capsule.tensors["epmoe" if control.mode == "epmoe" else "triton"] = described.results(result)
                recorder.write(control, capsule)
        return result

    def _capsule_before(self, generation, call, launch):
        written = call.written()
        inputs = {name: tensor for name, tensor in call.tensors().items() if name not in written}
        device = next((tensor.device for tensor in call.tensors().values()), None)
        before = {name: tensor.clone() for name, tensor in written.items() if name not in call.whole}
        capsule = capsules.Capsule(
            kernel=self.__name__,
            generation=generation,
            op=call.op,
            scalars=call.scalars(),
            launch=launch.told(),
            environment=capsules.environment(device),
            tensors={"argument": inputs, "before": before},
        )
        return capsule, call

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            original = self.original()
        except EpmoeError as error:  # who asks whether there is such an attribute wants no other error
            raise AttributeError(f"{name}: {error}") from None
        return getattr(original, name)

    def __repr__(self):
        return f"<epmoe.shim.{self.__name__}, mode {self._control.mode!r}>"


class Kernel(Shim):
    """``kernel[grid](*args, **kwargs)`` and ``kernel.run(*args, grid=…, warmup=…, **kwargs)`` as of a Triton kernel. In
    mode ``epmoe`` a launch returns None, for there is no compiled kernel."""

    def __init__(self, name, original=None):
        super().__init__(name, original)
        self._form = self._names = None
        self._defaults = {}
        self._last_read = math.inf
        if original is not None:
            self._form = form_of(original, name)
            parameters = inspect.signature(getattr(original, "fn", original)).parameters
            self._names = tuple(parameters)
            self._defaults = {n: p.default for n, p in parameters.items() if p.default is not p.empty}
        if self._form is not None:
            names = self._form.names
            sizes = [at for at, name in enumerate(names) if name in ("topk", "hidden_size")]
            tensors = [at for at, name in enumerate(names[: _LAST_POINTER + 1]) if name not in _NO_TENSOR]
            self._sizes, self._tensors = operator.itemgetter(*sizes), operator.itemgetter(*tensors)
            self._last_read = max(_LAST_POINTER, *sizes)

    def __getitem__(self, grid):
        return functools.partial(self._launch, grid)

    def run(self, *args, grid, warmup=False, **kwargs):
        if warmup:
            return self.original().run(*args, grid=grid, warmup=True, **kwargs)
        return self._launch(grid, *args, **kwargs)

    def __call__(self, *args, **kwargs):
        return self.original()(*args, **kwargs)

    def _launch(self, grid, /, *args, **kwargs):
        # What most launches come to: _serve would come to it too, by a longer way, which costs serving.
        control, original = self._control, self._original
        if original is not None and recorder.ring is None and not shadow.pending:
            mode = control.mode
            if mode == "triton" or (mode == "shadow" and self._passes(control.sampler, grid, args, kwargs)):
                result = original[grid](*args, **kwargs)
                control.by_triton.up()
                return result
        return self._serve((grid, args, kwargs))

    def _passes(self, sampler, grid, args, kwargs):
        """Whether shadow has no use for this launch, for certain."""
        if sampler.left < 1 or shadow.capturing():
            return False
        if sampler.first > 0 and sampler.seen.get(self._shape(grid, args, kwargs), 0) < sampler.first:
            return False
        sampler.left -= 1
        return True

    def _launch_original(self, grid, args, kwargs):
        return (self._original or self.original())[grid](*args, **kwargs)

    def _shape(self, grid, args, kwargs):
        """A kernel sees the grid, the sizes and the dtypes of a launch, and no shapes. Generations share a control."""
        if len(args) <= self._last_read:
            return shape_of(args, kwargs)
        if type(grid) is not tuple:
            grid = getattr(args[0], "shape", None), getattr(args[1], "shape", None)
        try:
            dtypes = tuple(map(_dtype, self._tensors(args)))
        except AttributeError:  # no tensors: what the kernel makes of them is not for the shim to say
            return shape_of(args, kwargs)
        return self._form.generation, grid, self._sizes(args), type(args[_LAST_POINTER]), dtypes

    def _describe(self, grid, args, kwargs):
        names, form = self._names, self._form
        if names is None:
            given = {name for name in kwargs if name not in OPTIONS}
            form = form_by_call(self.__name__, len(args), given)
            names = form.names
        elif form is None:
            raise Refused("its signature is not known", ", ".join(names))
        if form.refused:
            raise Refused(form.refused)
        if len(args) > len(names):
            raise Refused("too many positional arguments", str(len(args)))
        bound = {**self._defaults, **dict(zip(names, args, strict=False))}
        options = {}
        for name, value in kwargs.items():
            if name in OPTIONS:
                options[name] = value
            elif name not in names:
                raise Refused(f"unknown keyword {name}")
            elif name in names[: len(args)]:
                raise Refused(f"{name} is given twice")
            else:
                bound[name] = value
        if len(bound) != len(names):
            raise Refused("arguments are missing", ", ".join(name for name in names if name not in bound))
        programs, told = _programs(grid(bound) if callable(grid) else grid)
        values = {own: bound[name] for own, name in zip(form.names, names, strict=True)}
        call = TRANSLATE[self.__name__](values, programs, self._control.numerics)
        return form.generation, call, Launch(values, told, options)


class Helper(Shim):
    """A function that launches kernels, called as it was."""

    def __init__(self, name, original=None):
        super().__init__(name, original)
        self._helper = HELPERS[name]
        self._signature = None if original is None else inspect.signature(original)
        if original is not None:
            self.__doc__, self.__module__, self.__wrapped__ = original.__doc__, original.__module__, original

    def __call__(self, *args, **kwargs):
        return self._serve((args, kwargs))

    def _launch_original(self, args, kwargs):
        return (self._original or self.original())(*args, **kwargs)

    def _shape(self, args, kwargs):
        return shape_of(args, kwargs)

    def _describe(self, args, kwargs):
        helper = self._helper
        if self._signature is None:
            if len(args) > len(helper.names):
                raise Refused("too many positional arguments", str(len(args)))
            values = {**dict(zip(helper.names, args, strict=False)), **kwargs}
            if missing := [name for name in helper.names if name not in values]:
                raise Refused("arguments are missing", ", ".join(missing))
        else:
            try:
                bound = self._signature.bind(*args, **kwargs)
            except TypeError as error:
                raise Refused("the arguments do not fit", str(error)) from None
            bound.apply_defaults()
            values = bound.arguments
        helpers.check_options(helper, values)
        call = helpers.TRANSLATE[self.__name__](values, self._original, self._control.numerics)
        return "", call, Launch(values)


def _programs(grid):
    if not isinstance(grid, (tuple, list)) or not 1 <= len(grid) <= 3:
        raise Refused("the grid is no tuple of up to three numbers", repr(grid)[:40])
    if not all(isinstance(each, int) for each in grid):
        raise Refused("the grid is not made of whole numbers", repr(grid)[:40])
    if any(each != 1 for each in grid[1:]):
        raise Refused("the grid has more than one axis", repr(grid)[:40])
    return grid[0], list(grid)


class Launch:
    """A launch as it was, for reports that are rarely asked for: tensors by shape, strides and place."""

    def __init__(self, values, grid=None, options=None):
        self.grid, self.options = grid, options or {}
        self.values = {
            name: (value.dtype, value.shape, value.stride(), value.storage_offset(), value.device)
            if isinstance(value, Tensor)
            else value
            for name, value in values.items()
        }

    def told(self):
        found = {"options": {name: _plain(value) for name, value in self.options.items()}}
        if self.grid is not None:
            found["grid"] = self.grid
        found["arguments"] = {name: _plain(value) for name, value in self.values.items()}
        return found


def _plain(value):
    if isinstance(value, tuple):
        dtype, shape, strides, offset, device = value
        return {
            "dtype": str(dtype).removeprefix("torch."),
            "shape": list(shape),
            "strides": list(strides),
            "offset": offset,
            "device": str(device),
        }
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)[:80]


_REFUSALS = {
    "ERR_UNSUPPORTED_TENSOR",
    "ERR_NOT_A_TENSOR",
    "ERR_DTYPE",
    "ERR_RANK",
    "ERR_SHAPE",
    "ERR_NOT_CONTIGUOUS",
    "ERR_MISALIGNED",
    "ERR_DEVICE",
    "ERR_OVERLAP",
    "ERR_VALUE",
    "ERR_MISSING_ARGUMENT",
    "ERR_UNEXPECTED_ARGUMENT",
}


def _key(error):
    if isinstance(error, Refused):
        return error.key
    if isinstance(error, EpmoeError):
        return f"{error.code} {error.argument}".strip()
    return type(error).__name__


def _told(error):
    return str(error) if isinstance(error, (Refused, EpmoeError)) else f"{type(error).__name__}: {error}"


def _refusal(name, error):
    if isinstance(error, EpmoeError):
        return error
    return EpmoeError("ERR_SHIM_REFUSED", op=f"shim.{name}", expected="a call that epmoe takes", received=_told(error))


def make(name, original=None):
    return (Kernel if name in KERNELS else Helper)(name, original)


def set_recording(rate, first_per_shape):
    for control in controls.values():
        control.recording = Sampler(rate, first_per_shape)


def warn(text):
    warnings.warn(f"epmoe.shim: {text}", RuntimeWarning, stacklevel=3)
