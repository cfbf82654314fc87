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


class Encoding:
    """Holds texts up before they are encoded, until it is opened, and keeps them."""

    def __init__(self, engine):
        self.event, self.requests = threading.Event(), []
        self.encode, engine.encode = engine.encode, self._held

    def _held(self, request):
        self.requests.append(request)
        self.event.wait()
        return self.encode(request)

    def open(self):
        self.event.set()


class Asked:
    """Counts the blocks that forward passes hand to Node."""

    def __init__(self, engine):
        self.count = 0
        self._ask = engine.experts._ask
        engine.experts._ask = self

    def __call__(self, request):
        self.count += 1
        return self._ask(request)


class Logits:
    """Keeps the logits of every pass, and the experts that its routers chose."""

    def __init__(self, engine):
        self.engine, self.kept, self.chosen = engine, [], []
        keep = engine.model.register_forward_hook(lambda _m, _a, out: self.kept.append(out.logits[0].double()))
        choices = lambda _m, _a, out: self.chosen.append(out[2])
        self.handles = [keep, *(router.register_forward_hook(choices) for router in _routers(engine.model))]

    def take(self):
        """The logits, and each pass's choices by layer."""
        layers = len(_routers(self.engine.model))
        kept, chosen = torch.cat(self.kept), [self.chosen[i : i + layers] for i in range(0, len(self.chosen), layers)]
        self.kept, self.chosen = [], []
        return kept, chosen

    def remove(self):
        for handle in self.handles:
            handle.remove()

    def exact(self, prompts, chosen=None):
        """The last logits of each prompt by the model in float64, with transformers' own attention and experts.

        With ``chosen``, a list by layer for each prompt, the routers' choice is this one.
        """
        model = copy.copy(self.engine.model)
        double = type(model)(copy.deepcopy(model.config)).double()
        double.load_state_dict(model.state_dict())
        double.config._attn_implementation = "eager"
        double.config._experts_implementation = "eager"
        double.to(model.device).eval()
        left = iter([] if chosen is None else [ids for each in chosen for ids in each])
        if chosen is not None:
            for router in _routers(double):
                router.register_forward_hook(lambda _m, _a, out: _routed(out[0], next(left)))
        with torch.no_grad():
            return torch.cat([double(torch.tensor([ids]).to(model.device)).logits[0, -1:] for ids in prompts])


def _routers(model):
    return [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]


def _routed(logits, ids):
    """What a router that normalises gives for these ids."""
    weights = logits.softmax(-1).gather(1, ids)
    return logits, weights / weights.sum(-1, keepdim=True), ids


def save(engine, folder):
    engine.model.save_pretrained(folder)
    engine.tokenizer.save_pretrained(folder)


def spoilt(grouped_gemm):
    """A grouped GEMM that is off by so little that only a comparison tells."""
    return lambda *args: grouped_gemm(*args) * (1 + 2.0**-7)


def misdirect(experts):
    """Asks for the experts of a layer that does not exist."""
    experts.asked = experts._ask
    experts._ask = lambda request: experts.asked((10**6, *request[1:]))


def direct(experts):
    experts._ask = experts.asked
