"""What tests do to a served model from within."""

import copy
import threading

import torch


class Gate:
    """Holds forward passes up before they begin, without the GIL, for as long as it is shut."""

    def __init__(self, engine):
        self.event = threading.Event()
        self.event.set()
        self.entered = 0
        self.handle = engine.model.register_forward_pre_hook(self._wait)

    def _wait(self, *_):
        self.entered += 1
        self.event.wait()

    def shut(self):
        self.event.clear()

    def open(self):
        self.event.set()

    def remove(self):
        self.open()
        self.handle.remove()


class Faults:
    """Makes forward passes fail that have this token in them."""

    def __init__(self, engine, token):
        self.token = token
        self.handle = engine.model.register_forward_pre_hook(self._check, with_kwargs=True)

    def _check(self, _module, _args, kwargs):
        if (kwargs["input_ids"] == self.token).any():
            raise ArithmeticError(f"token {self.token} on purpose")

    def remove(self):
        self.handle.remove()


def without(engine, text):
    """Makes the tokenizer fail on requests that have this text in them."""
    encode = engine.encode

    def failing(request):
        if text in request:
            raise ArithmeticError(f"{text} on purpose")
        return encode(request)

    engine.encode = failing


class Logits:
    """Keeps the logits of every pass."""

    def __init__(self, engine):
        self.engine, self.kept = engine, []
        self.handle = engine.model.register_forward_hook(lambda _m, _a, out: self.kept.append(out.logits[0].double()))

    def take(self):
        kept, self.kept = torch.cat(self.kept), []
        return kept

    def exact(self, prompts):
        """The last logits of each prompt by the model in float64, with transformers' own attention and experts."""
        model = copy.copy(self.engine.model)
        double = type(model)(copy.deepcopy(model.config)).double()
        double.load_state_dict(model.state_dict())
        double.config._attn_implementation = "eager"
        double.config._experts_implementation = "eager"
        double.to(model.device).eval()
        with torch.no_grad():
            return torch.cat([double(torch.tensor([ids]).to(model.device)).logits[0, -1:] for ids in prompts])


def error(values, exact):
    return ((values - exact).norm() / exact.norm()).item()


def save(engine, folder):
    engine.model.save_pretrained(folder)
    engine.tokenizer.save_pretrained(folder)


def spoilt(grouped_gemm):
    """A grouped GEMM that is off by so little that only a comparison tells."""
    return lambda *args: grouped_gemm(*args) * (1 + 2.0**-7)


def misdirect(experts):
    """Asks for the experts of a layer that does not exist."""
    experts.asked = experts._ask
    experts._ask = lambda request: experts.asked(((10**6, False), *request[1:]))


def direct(experts):
    experts._ask = experts.asked
