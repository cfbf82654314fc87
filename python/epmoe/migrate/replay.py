"""A capsule as a call that can be made again: checked, with the results that were recorded."""

import dataclasses

import torch

from epmoe.errors import EpmoeError
from epmoe.migrate import calls, capsule
from epmoe.migrate.capsule import CapsuleError
from epmoe.ops import ep_scatter
from epmoe.ops._float8 import raw

MAX_SCALARS = 64


def read(path):
    """``{"call": Call}`` of a capsule; of any other file, ``{"error": …}`` with the fields of its EpmoeError."""
    try:
        return {"call": Call(capsule.load(path), path)}
    except EpmoeError as error:
        fields = ("code", "argument", "expected", "received", "hint")
        return {"error": {name: getattr(error, name) for name in fields}}


class Call:
    """``described`` is plain data; tensors are asked for by name. Nothing here has been run."""

    def __init__(self, held, path):
        self.capsule, self.path = held, str(path)
        self.arguments = held.part("argument")
        try:
            self._check()
            self.recorded = self._recorded()
        except EpmoeError:
            raise
        except Exception as error:  # whatever a made-up capsule brings about is the capsule's fault
            raise self._bad("arguments that fit together", f"{type(error).__name__}: {error}") from None

    def _bad(self, expected, received, hint=""):
        return CapsuleError(self.path, expected, received, hint)

    def _check(self):
        held = self.capsule
        if held.op not in calls.AXES:
            raise self._bad(f"an op of {', '.join(calls.AXES)}", repr(held.op)[:80])
        if len(held.scalars) > MAX_SCALARS:
            raise self._bad(f"at most {MAX_SCALARS} scalars", str(len(held.scalars)))
        for name, value in held.scalars.items():
            if isinstance(value, bool) or not isinstance(value, (int, float, str)) or abs_of(value) > 2**53:
                raise self._bad(f"a number or word for {name[:40]}", repr(value)[:80])
        outputs = calls.OUTPUTS[held.op]
        known = calls.AXES[held.op].keys() - set(outputs) | ({"masked_m"} if held.op.endswith("_and_mul") else set())
        if stray := sorted(self.arguments.keys() - known):
            raise self._bad(f"arguments of {held.op}", stray[0])
        self.outputs = self._outputs(outputs)
        if not self.outputs:
            raise self._bad(f"outputs of {held.op}: {', '.join(outputs)}", "none")
        for part in ("before", "triton", "epmoe"):
            for name, tensor in held.part(part).items():
                shape, dtype = self.outputs.get(name, (None, None))
                if shape != tuple(tensor.shape) or dtype != tensor.dtype:
                    raise self._bad(f"{name} as {shape} of {dtype}", f"{tuple(tensor.shape)} of {tensor.dtype}")

    def _outputs(self, names):
        """Shapes and dtypes of what the call writes, from whatever was recorded of it."""
        held, found = self.capsule, {}
        for name in names:
            for part in ("before", "triton", "epmoe"):
                if name in held.part(part):
                    tensor = held.part(part)[name]
                    found[name] = tuple(tensor.shape), tensor.dtype
        # The original cuts the slots of -1 off; epmoe leaves it to the caller.
        order = found.get("reorder_topk_ids")
        if held.op == "preprocess" and order is not None and held.scalars.get("negatives") == "dropped":
            for part in ("triton", "epmoe"):
                if (short := held.part(part).get("reorder_topk_ids")) is not None:
                    missing = self.arguments["topk_ids"].numel() - short.numel()
                    held.part(part)["reorder_topk_ids"] = torch.cat([short, short.new_full((max(0, missing),), -1)])
            found["reorder_topk_ids"] = (self.arguments["topk_ids"].numel(),), order[1]
        return found

    def _recorded(self):
        """Results that were recorded, of ``triton`` and ``epmoe``: what the call leaves as it was is poison."""
        held, found = self.capsule, {}
        before = held.part("before")
        for part in ("triton", "epmoe"):
            results = {name: tensor for name, tensor in held.part(part).items() if name in self.outputs}
            if results.keys() != self.outputs.keys():
                continue
            if held.op == "ep_scatter":
                results = self._ordered(results)
            for name, tensor in results.items():
                shape = tensor.shape
                tensors = {**self.arguments, **results}
                written = calls.written_rows(held.op, tensors, held.scalars, name, shape)
                if name == "m_indices":
                    written = torch.arange(shape[0]) < int(self.arguments["num_recv_tokens_per_expert"].sum())
                    results[name] = torch.where(written, tensor, -1)
                elif written is not None and name in before:
                    kept = ~written.view(*written.shape, *(1 for _ in range(len(shape) - written.dim())))
                    kept = kept & bits_equal(tensor, before[name])
                    results[name] = tensor.clone()
                    raw(results[name])[kept] = raw(calls.poison((1,), tensor.dtype))[0]
            found[part] = results
        return found

    def _ordered(self, results):
        made = tuple(results[name] for name in _SCATTERED)
        ordered = tuple(calls.poison(tensor.shape, tensor.dtype) for tensor in made)
        before = self.capsule.part("before")
        for name, fresh in zip(_SCATTERED[1:3], ordered[1:3], strict=True):
            raw(fresh).copy_(raw(before.get(name, fresh)))
        ep_scatter.put_in_order(self.arguments["recv_topk"], made, ordered)
        return {**results, **dict(zip(_SCATTERED, ordered, strict=True))}

    def described(self):
        held = dataclasses.asdict(dataclasses.replace(self.capsule, tensors={}))
        del held["tensors"]
        return {
            **held,
            "arguments": list(self.arguments),
            "outputs": {
                name: {"shape": shape, "dtype": name_of(dtype)} for name, (shape, dtype) in self.outputs.items()
            },
            "recorded": list(self.recorded),
        }

    def tensor(self, part, name):
        """``part`` is ``argument``, or ``triton`` or ``epmoe`` for what was recorded."""
        tensor = self.arguments[name] if part == "argument" else self.recorded[part][name]
        return tensor.contiguous()


_SCATTERED = ("expert_start_loc", "output_tensor", "output_tensor_scale", "output_index")


def bits_equal(a, b):
    return raw(a).view(torch.uint8).view(*a.shape, -1).eq(raw(b).view(torch.uint8).view(*b.shape, -1)).all(-1)


def abs_of(value):
    return 0 if isinstance(value, str) else abs(value)


def name_of(dtype):
    return str(dtype).removeprefix("torch.")
