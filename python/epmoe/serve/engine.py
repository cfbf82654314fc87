"""One model and its sequences: what Node drives."""

import contextlib
import json

import torch

from epmoe._executor import ring
from epmoe.serve import models, sampling, slots
from epmoe.serve.experts import Experts, elapsed, mark
from epmoe.serve.handoff import Handoff
from epmoe.serve.text import Detokenizer, bytes_of, most_bytes

__all__ = ["Engine"]

_NOTHING = contextlib.nullcontext()


class Engine:
    """A pass begins with :meth:`step`. JavaScript is rung when :meth:`take` has something: a request for experts, see
    :class:`Experts`, to be met by :meth:`resume` or :meth:`fail`, and at last the pass's result, a JSON text. None of
    these waits; the others may.
    """

    def __init__(self, options):
        options = json.loads(options)
        self.model, self.tokenizer = models.load(
            options["model"], options["device"], options["dtype"], options["seed"], options["config"]
        )
        self.context = min(options["context"], self.model.config.get_text_config().max_position_embeddings)
        self.handoff = Handoff(self._context_of_passes, ring)
        self.modules = models.experts_of(self.model)
        self.experts = Experts(self.modules, self.handoff.ask)
        self.cache = slots.SlotCache(options["slots"], self.context)
        self._texts = {}
        self._most_bytes = most_bytes(self.tokenizer)
        try:
            self._allocate()
        except BaseException:
            self.close()
            raise

    def _allocate(self):
        """The cache is made by a pass, which knows its shapes: now, while there is nobody who would be let down."""
        rows = [{"slot": 0, "start": 0, "tokens": [0]}]
        self.step(json.dumps({"mode": "original", "compared": False, "rows": rows}))
        self.take(wait=True)

    @contextlib.contextmanager
    def _context_of_passes(self):
        """Grad mode and CUDA device are kept by thread."""
        with torch.no_grad(), torch.cuda.device(self.model.device) if self.model.device.type == "cuda" else _NOTHING:
            yield

    def facts(self):
        """What Node has to know about the model; JSON."""
        config, generation = self.model.config, self.model.generation_config
        ends = generation.eos_token_id if generation.eos_token_id is not None else config.eos_token_id
        first = self.modules[0].gate_up_proj
        return json.dumps(
            {
                "architecture": type(self.model).__name__,
                "parameters": sum(each.numel() for each in self.model.parameters()),
                "vocabulary": config.get_text_config().vocab_size,
                "context": self.context,
                "ends": ends if isinstance(ends, list) else [] if ends is None else [ends],
                "layers": len(self.modules),
                "device": str(first.device),
                "dtype": str(first.dtype).removeprefix("torch."),
                "chat": self.tokenizer.chat_template is not None,
            }
        )

    def layers(self):
        return [models.layer_of(module) for module in self.modules]

    def replay_with(self, graphs):
        """``graphs`` are each layer's :class:`epmoe.layer_graphs.LayerGraphs`, or None."""
        self.experts.graphs = graphs

    def encode(self, request):
        """Token ids of a text, or of messages, or at least how many they are if that is too many; JSON to JSON."""
        request = json.loads(request)
        text, options = request.get("text"), {}
        if text is None:
            text = self.tokenizer.apply_chat_template(request["messages"], tokenize=False, add_generation_prompt=True)
            options["add_special_tokens"] = False
        # A text far beyond the context would keep everybody else's waiting for nothing.
        least = -(-len(text.encode()) // self._most_bytes)
        return json.dumps(least if least > self.context else self.tokenizer(text, verbose=False, **options).input_ids)

    def step(self, plan):
        """One forward pass. ``plan`` is JSON: the mode, whether shadow compares, and rows.

        A row has its slot, the position of its first token, tokens, and, if a token is to be sampled behind the last,
        a wish: see :func:`sampling.sample`; ``logprobs`` is how many alternatives are asked for, or absent.
        """
        self.handoff.run(self._pass, json.loads(plan))

    def resume(self, output):
        self.handoff.answer(output)

    def fail(self, message):
        self.handoff.fail(RuntimeError(message))

    def take(self, wait=False):
        """A list of what is next in the pass; empty where that is not known yet."""
        event = self.handoff.take(wait)
        return [] if event is None else [event[1]]

    def close(self):
        self.handoff.close()
        self.cache = self.model = self.modules = self.experts = None

    def _pass(self, plan):
        self.experts.begin(plan["mode"], plan["compared"])
        rows, tokens = [], []
        for row in plan["rows"]:
            rows.append(slots.Row(row["slot"], row["start"], len(tokens), len(row["tokens"])))
            tokens += row["tokens"]
        device = self.model.device
        begin = mark(device)
        positions = self.cache.begin(rows, device)
        sampled = [i for i, row in enumerate(plan["rows"]) if row.get("wish") is not None]
        last = torch.tensor([rows[i].first + rows[i].count - 1 for i in sampled], dtype=torch.int64).to(device)
        with slots.kernels():
            logits = self.model(
                input_ids=torch.tensor([tokens]).to(device),
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=last,
                slots=self.cache,
            ).logits[0]
        wishes = [plan["rows"][i]["wish"] for i in sampled]
        chosen = sampling.sample(logits.float(), wishes) if sampled else []
        end = mark(device)
        if device.type == "cuda":
            end.synchronize()
        results = [
            self._told(plan["rows"][i], logits[place], token)
            for place, (i, token) in enumerate(zip(sampled, chosen, strict=True))
        ]
        return json.dumps(
            {
                "rows": results,
                "seconds": elapsed(begin, end),
                "expert_seconds": self.experts.seconds(),
                "shadow": self.experts.shadow,
            },
            allow_nan=False,
        )

    def _told(self, row, logits, token):
        slot, wish = row["slot"], row["wish"]
        if wish["first"]:
            self._texts[slot] = Detokenizer(self.tokenizer)
        text, held = self._texts[slot].push(token)
        result = {"token": token, "text": text, "held": held}
        if wish.get("logprobs") is not None:
            own, top = sampling.log_probabilities(logits.float(), token, wish["logprobs"])
            result["own"] = self._likely(token, own)
            result["top"] = [self._likely(*each) for each in top]
        return result

    def _likely(self, token, logprob):
        return {"token": self.tokenizer.decode([token]), "logprob": logprob, "bytes": bytes_of(self.tokenizer, token)}
