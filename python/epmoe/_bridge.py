"""The Python end of the bridge from Node.

Every call comes through :func:`guard`, from csrc/node/crossing.cc, which hands over ordinary objects and takes what is
returned. Exceptions do not cross: they leave as text, because what could carry them over loses parts of them.
"""

import concurrent.futures
import importlib
import json
import queue
import sys
import threading
import time
import traceback

from epmoe.errors import EpmoeError


class Outcome(tuple):
    """``(value, bytes)``: an object, and what letting go of it would free; or ``(text, FAILURE)``, ``(text, TOLD)``."""

    __slots__ = ()


FAILURE = -1  # the text describes an exception
TOLD = -2  # the text is a value, for JavaScript to convert


class Request:
    """A call of a JavaScript function: its arguments, and what became of it."""

    __slots__ = ("args", "error", "result")

    def __init__(self, args):
        self.args, self.result, self.error = args, None, None


def _bytes_of(value):
    torch = sys.modules.get("torch")
    # While torch is being imported, it is there but has no Tensor yet.
    tensor = getattr(torch, "Tensor", None)
    if tensor is None or not isinstance(value, tensor):
        return 0
    try:
        return value.nbytes
    except Exception:  # sparse tensors, and others without memory of their own
        return 0


class JavaScriptError(Exception):
    """An error thrown by a JavaScript function that Python called; ``token`` finds the original on the other side."""

    def __init__(self, message, token):
        super().__init__(message)
        self.token = token


# How long, in seconds, a function of JavaScript's waits for JavaScript's thread to return from a wait of its own.
patience = 10.0

_javascript_thread = threading.get_ident()  # which imports this module
_synchronous_calls = 0  # under way on it
_waits = (threading.__file__, queue.__file__, concurrent.futures._base.__file__)  # frames of who waits for a thread

inbox = []
_attached = []
_jobs = None  # the executor, once Node has asked for it


def guard(function, arguments):
    """Calls a function of :data:`operations`; never raises. Returns an outcome, as :class:`Outcome` says."""
    global _synchronous_calls
    _synchronous_calls += 1
    try:
        result = function(*arguments)
        return result if type(result) is Outcome else (result, _bytes_of(result))
    except BaseException as error:
        return failure(error)
    finally:
        _synchronous_calls -= 1


def raise_error(error):
    """For what failed before it came to :func:`guard`."""
    raise error


def outcome(value):
    """What a job has come to, to be handed over later."""
    return Outcome((value, _bytes_of(value)))


def failure(error):
    """The same of an exception."""
    try:
        message = str(error)
    except BaseException:
        message = "<unprintable>"
    cause = error
    token = ""
    while cause is not None and not token:
        token = str(getattr(cause, "token", "")) if isinstance(cause, JavaScriptError) else ""
        cause = cause.__cause__ or cause.__context__
    try:
        trace = "".join(traceback.format_exception(error))
    except BaseException:
        trace = ""
    details = {"type": type(error).__qualname__, "message": message, "traceback": trace, "token": token}
    if isinstance(error, EpmoeError):
        parts = ("code", "op", "argument", "expected", "received", "hint")
        details["epmoe"] = [getattr(error, part) for part in parts]
    return Outcome((json.dumps(details), FAILURE))


def _value(operation, *arguments):
    return Outcome((json.dumps(_encode(operations[operation](*arguments))), TOLD))


def _callback(function):
    def callback(*args, **kwargs):
        args = (*args, kwargs) if kwargs else args
        if threading.get_ident() != _javascript_thread:
            _await_javascript()
        request = Request(args)
        function(request)
        result, error = request.result, request.error
        # JavaScript's collector lets go of the request when it gets round to it: not of tensors as late.
        request.args = request.result = request.error = None
        if error is not None:
            raise error
        return result

    return callback


def _await_javascript():
    """Waits until JavaScript's thread can run a function for this one.

    It cannot while it is in a synchronous call. When that call itself waits for other threads, it may well wait for
    this one, and both would wait forever.
    """
    since = None
    while _synchronous_calls:
        frame = sys._current_frames().get(_javascript_thread)
        waits = frame is not None and frame.f_code.co_filename in _waits
        since = (since or time.monotonic()) if waits else None
        if since is not None and time.monotonic() - since > patience:
            raise RuntimeError(
                "a JavaScript function was called from a thread while JavaScript's own waits for threads in a "
                "synchronous call: neither could go on. Make that call with callAsync() or methodAsync()"
            )
        time.sleep(0.001)


def _answer(request, value):
    request.result = value


def _fail(request, message, token):
    request.error = JavaScriptError(message, token)


def _encode(value):
    """A value as JSON that JavaScript reads without loss; raises TypeError for what has no counterpart there."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return {"$": ["int", str(int(value))]} if abs(value) > 2**53 else int(value)
    if isinstance(value, float):
        return {"$": ["float", repr(float(value))]}
    if isinstance(value, (list, tuple)):
        return {"$": ["list", [_encode(item) for item in value]]}
    if isinstance(value, dict):
        return {"$": ["dict", [[_encode(key), _encode(item)] for key, item in value.items()]]}
    raise TypeError(
        f"{type(value).__qualname__} has no JavaScript counterpart; "
        "convert it to numbers, strings, lists or dicts first, or a tensor with Tensor.fromTorch()"
    )


def _plain(value):
    """``[value]`` for what JavaScript can hold without a handle; ``None`` for the rest."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return [value]
    # Sizes and strides are tuples of numbers; a container of objects stays one.
    if isinstance(value, (list, tuple)) and all(isinstance(item, (bool, int, float, str)) for item in value):
        return [list(value)]
    return None


def _evaluate(expression, names):
    return eval(expression, dict(names))


def _execute(source, filename):
    """Runs a module's source; the lines are registered so that tracebacks and Triton find them."""
    import linecache
    import types

    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    module = types.ModuleType("epmoe_inline")
    module.__file__ = filename
    exec(compile(source, filename, "exec"), module.__dict__)
    return module


_END = object()


def _next(iterator):
    item = next(iterator, _END)
    return [] if item is _END else [item]


def _torch_facts():
    """Addresses of what the addon needs of torch: the tensor type, its exchange table (or 0), and the inbox."""
    import torch

    from epmoe._dlpack import exchange_capsule

    capsule = exchange_capsule()
    _attached[:] = [torch.Tensor, capsule, inbox]
    return f"{id(torch.Tensor)} {0 if capsule is None else id(capsule)} {id(inbox)}"


def _to_capsule(tensor):
    """A DLPack capsule of a torch tensor; refuses what the protocol would export without saying so."""
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"expected a torch.Tensor, received {type(tensor).__qualname__}")
    if tensor.is_neg():
        raise BufferError("a tensor with its negative bit set; call resolve_neg() on it first")
    if tensor.is_cuda and not _attached[1]:
        # Without the exchange table nobody can ask torch for its stream later: what is under way is waited for here.
        torch.cuda.current_stream(tensor.device).synchronize()
    return tensor.__dlpack__()


def _torch_from_inbox():
    import torch

    return torch.from_dlpack(_Exporter(inbox.pop()))


class _Exporter:
    """Wraps a capsule as an object of the protocol, which every version of torch accepts."""

    def __init__(self, capsule):
        self.capsule = capsule

    def __dlpack__(self, stream=None, **_):
        return self.capsule

    def __dlpack_device__(self):
        return _capsule_device(self.capsule)


def _capsule_device(capsule):
    import ctypes

    class Device(ctypes.Structure):
        _fields_ = [("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32)]

    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    device = Device.from_address(get_pointer(capsule, b"dltensor"))
    return device.device_type, device.device_id


def _allocations(device_id):
    import torch

    return torch.cuda.memory_stats(device_id).get("allocation.all.allocated", 0)


def _current_stream(device_id):
    import torch

    return torch.cuda.current_stream(device_id).cuda_stream


def _executor():
    from epmoe import _executor as module

    return module


def _start_executor(address):
    global _jobs
    _jobs = _executor().start(address, outcome, failure)


def _submit(number, operation, arguments, options):
    function = (
        operations[operation]
        if operation not in ("run", "async_next")
        else getattr(_jobs, {"run": "run_awaitable", "async_next": "next_of"}[operation])
    )
    _jobs.submit(number, function, arguments, options)


def _reload(module):
    """``importlib.reload`` of a module and, first, of its loaded submodules."""
    prefix = f"{module.__name__}."
    for name in sorted((name for name in sys.modules if name.startswith(prefix)), key=lambda name: -name.count(".")):
        importlib.reload(sys.modules[name])
    return importlib.reload(module)


def _exit_context(context, failure):
    """Leaves a ``with`` block; ``failure`` is None or what JavaScript's block threw. Whether it was swallowed."""
    if failure is None:
        context.__exit__(None, None, None)
        return False
    error = JavaScriptError(failure, "")
    return bool(context.__exit__(JavaScriptError, error, None))


def _abandon(code):
    """Ends the process where finalising the interpreter would crash or hang."""
    import os

    os._exit(code)


operations = {
    "import": importlib.import_module,
    "eval": _evaluate,
    "exec": _execute,
    "call": lambda function, args, kwargs: function(*args, **kwargs),
    "method": lambda value, name, args, kwargs: getattr(value, name)(*args, **kwargs),
    "callback": _callback,
    "value": _value,
    "get": getattr,
    "has": hasattr,
    "plain": _plain,
    "set": setattr,
    "item": lambda value, key: value[key],
    "set_item": lambda value, key, item: value.__setitem__(key, item),
    "len": len,
    "iter": iter,
    "next": _next,
    "repr": repr,
    "same": lambda value: value,
    "answer": _answer,
    "fail": _fail,
    "torch_facts": _torch_facts,
    "to_capsule": _to_capsule,
    "take": inbox.pop,
    "take_tensor": _torch_from_inbox,
    "current_stream": _current_stream,
    "allocations": _allocations,
    "reload": _reload,
    "enter": lambda context: context.__enter__(),
    "exit_context": _exit_context,
    "async_iter": lambda value: value.__aiter__() if hasattr(value, "__aiter__") else iter(value),
    "start_executor": _start_executor,
    "submit": _submit,
    "cancel": lambda number: _jobs.cancel(number),
    "events": lambda: _jobs.events(),
    "collect": lambda number: _jobs.collect(number),
    "shutdown": lambda seconds: _executor().shutdown(seconds),
    "abandon": _abandon,
}


def prepare(executable):
    """Settles what the embedding leaves wrong; called once, right after the interpreter has started."""
    import multiprocessing
    import os

    # A forked child would inherit Node's signal handlers and none of its threads.
    multiprocessing.set_start_method("spawn", force=True)
    sys.setswitchinterval(5e-4)
    os.environ.pop("PYTHONEXECUTABLE", None)
    sys.executable = executable
    return f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
