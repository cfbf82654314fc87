"""The model's side of ``epmoe serve``: the cache of slots, sampling, text, the handoff, and shadow's verdict."""

import copy
import json
import threading
import unittest
from unittest import mock

try:
    import transformers

    MISSING = None if int(transformers.__version__.split(".")[0]) >= 5 else "transformers is older than 5"
except ImportError:
    MISSING = "transformers is not installed: pip install -r python/requirements-test.txt"

import torch

if MISSING is None:
    from tokenizers import Tokenizer, normalizers
    from tokenizers.models import WordLevel

    from epmoe.serve import models, sampling
    from epmoe.serve.engine import Engine
    from epmoe.serve.experts import Experts, exact_experts
    from epmoe.serve.handoff import Handoff
    from epmoe.serve.slots import Row, SlotCache
    from epmoe.serve.text import LONGEST_WAIT, Detokenizer, bytes_of, most_bytes

GREEDY = {"temperature": 0, "top_p": 1, "uniform": 0}


def engine(model, slots=4, context=256, **config):
    options = {"model": model, "device": "cpu", "dtype": "auto", "seed": 3}
    return Engine(json.dumps({**options, "config": config, "slots": slots, "context": context}))


class Sequence:
    def __init__(self, slot, prompt):
        self.slot, self.tokens, self.start, self.out = slot, list(prompt), 0, []


def passed(served, plan):
    """A pass that asks for nothing."""
    served.step(json.dumps(plan))
    return strict(*served.take(wait=True))


def strict(text):
    """JSON as JavaScript reads it."""
    return json.loads(text, parse_constant=mock.Mock(side_effect=ValueError("no JSON")))


def generate(served, prompts, count, chunk):
    """``count`` tokens for each prompt; parts of prompts of ``chunk`` tokens and single tokens share passes.

    Odd slots begin with a part of one less, so that parts of as many tokens each start at different positions.
    """
    sequences = [Sequence(slot, prompt) for slot, prompt in prompts.items()]
    while active := [each for each in sequences if len(each.out) < count]:
        rows = []
        for each in active:
            part = each.tokens[: chunk - (each.start == 0 and each.slot % 2)]
            whole = len(part) == len(each.tokens)
            wish = {**GREEDY, "first": not each.out} if whole else None
            rows.append({"slot": each.slot, "start": each.start, "tokens": part, "wish": wish})
        told = iter(passed(served, {"mode": "original", "compared": False, "rows": rows})["rows"])
        for each, row in zip(active, rows, strict=True):
            each.start += len(row["tokens"])
            each.tokens = each.tokens[len(row["tokens"]) :]
            if row["wish"] is not None:
                each.out.append(next(told)["token"])
                each.tokens = [each.out[-1]]
    return [each.out for each in sequences]


@unittest.skipIf(MISSING, MISSING)
class Passes(unittest.TestCase):
    """Sequences that share passes get what transformers gives each of them alone."""

    def setUp(self):
        self.prompts = [list(range(40, 40 + length)) for length in (1, 7, 23, 64)]

    def alone(self, served, prompt, count):
        """By transformers' own cache, attention and loop."""
        config = served.model.config
        slots, config._attn_implementation = config._attn_implementation, "eager"
        try:
            ids = torch.tensor([prompt])
            options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "eos_token_id": None}
            return served.model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()
        finally:
            config._attn_implementation = slots

    def check(self, served):
        expected = [self.alone(served, prompt, 24) for prompt in self.prompts]
        self.assertEqual(len({tuple(each) for each in expected}), len(expected))
        for chunk in (5, 1000):
            # The longest first, in slots that are not in order; in the first pass, parts of as many tokens are apart.
            given = {slot: prompt for slot, prompt in zip((2, 3, 0, 1), reversed(self.prompts), strict=True)}
            self.assertEqual(generate(served, given, 24, chunk), expected[::-1], chunk)
        served.close()

    def test_qwen3_moe(self):
        self.check(engine("qwen3-moe"))

    def test_mixtral(self):
        self.check(engine("mixtral"))

    def test_sliding_window(self):
        """A window shorter than the prompts."""
        self.check(engine("mixtral", sliding_window=9))

    def test_a_slot_is_used_again(self):
        served = engine("qwen3-moe", slots=1)
        first = generate(served, {0: self.prompts[3]}, 8, 1000)
        generate(served, {0: self.prompts[2]}, 20, 1000)
        self.assertEqual(generate(served, {0: self.prompts[3]}, 8, 1000), first)
        served.close()

    def test_a_wrong_slot_is_noticed(self):
        """The comparison can fail: what another sequence left behind is not what this one needs."""
        served = engine("qwen3-moe")
        generate(served, {0: self.prompts[3], 1: self.prompts[3][::-1]}, 2, 1000)
        row = {"tokens": [7], "wish": {**GREEDY, "first": True, "logprobs": 5}}
        told = [
            passed(served, {"mode": "original", "compared": False, "rows": [{**row, **place}]})
            for place in ({"slot": 0, "start": 20}, {"slot": 1, "start": 20}, {"slot": 0, "start": 19})
        ]
        self.assertEqual(len({each["rows"][0]["own"]["logprob"] for each in told}), 3)
        served.close()

    def test_attention_keeps_no_plan_for_each_length(self):
        """cuDNN's would, on GPUs that torch prefers it on."""
        served = engine("qwen3-moe")
        backends, seen = torch.backends.cuda, []
        allowed = lambda: (backends.cudnn_sdp_enabled(), backends.flash_sdp_enabled(), backends.math_sdp_enabled())
        before = allowed()
        served.model.register_forward_pre_hook(lambda *_: seen.append(allowed()))
        generate(served, {0: self.prompts[1]}, 2, 1000)
        self.assertEqual(before, (True, True, True))
        self.assertEqual(set(seen), {(False, True, True)})
        self.assertEqual(allowed(), before)
        served.close()

    def test_a_failed_pass_leaves_nothing_behind(self):
        served = engine("qwen3-moe")
        expected = generate(served, {0: self.prompts[1]}, 8, 1000)
        plan = {"mode": "epmoe", "compared": False, "rows": [{"slot": 0, "start": 0, "tokens": [1], "wish": None}]}
        served.step(json.dumps(plan))
        ((what, hidden, _ids, _weights),) = served.take(wait=True)
        self.assertEqual((what, list(hidden.shape)), (0, [1, 128]))
        with self.assertRaisesRegex(RuntimeError, "on purpose"):
            served.fail("on purpose")
            served.take(wait=True)
        self.assertEqual(generate(served, {0: self.prompts[1]}, 8, 1000), expected)
        served.close()
        with self.assertRaisesRegex(RuntimeError, "closed"):
            served.handoff.run(print)

    def test_logits_that_are_no_numbers_fail_nobody(self):
        served = engine("qwen3-moe")

        def spoil(_model, _arguments, out):
            out.logits[0, 0] = float("nan")
            out.logits[0, 1, 1:] = -torch.inf

        served.model.register_forward_hook(spoil)
        wish = {**GREEDY, "first": True, "logprobs": 2}
        rows = [{"slot": slot, "start": 0, "tokens": [7], "wish": wish} for slot in range(3)]
        broken, certain, sound = passed(served, {"mode": "original", "compared": False, "rows": rows})["rows"]
        self.assertEqual([each["logprob"] for each in broken["top"]], [sampling.UNLIKELY] * 2)
        self.assertEqual([each["logprob"] for each in certain["top"]], [0, sampling.UNLIKELY])
        self.assertTrue(-20 < sound["own"]["logprob"] < 0)
        served.close()

    def test_a_cache_too_large_is_refused_at_the_start(self):
        with self.assertRaisesRegex(ValueError, f"slots, context: .* received {2**40} slots of 256 tokens"):
            engine("qwen3-moe", slots=2**40)
        self.assertNotIn("epmoe-serve", [each.name for each in threading.enumerate()])

    def test_what_cannot_fit_is_not_encoded(self):
        served = engine("qwen3-moe")
        encoded = lambda request: json.loads(served.encode(json.dumps(request)))
        # The longest token, a mark, is of 9 bytes.
        self.assertEqual(encoded({"text": models.BEGIN * 256}), [256] * 256)
        self.assertEqual(encoded({"text": models.BEGIN * 256 + "a"}), 257)
        self.assertEqual(encoded({"text": "é" * 1200}), 267)
        self.assertEqual(len(encoded({"text": "é" * 1100})), 2200)
        message = lambda count: {"messages": [{"role": "user", "content": "a" * count}]}
        self.assertEqual(encoded(message(2304)), 259)
        self.assertEqual(len(encoded(message(200))), 200 + len("<|user|>\n\n<|assistant|>\n"))
        served.close()

    def test_what_cannot_be_served_is_refused(self):
        with self.assertRaisesRegex(ValueError, "or a folder"):
            engine("no-such-model")
        dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(hidden_size=32, num_hidden_layers=1))
        with self.assertRaisesRegex(ValueError, "no mixture-of-experts blocks"):
            models.experts_of(dense)


@unittest.skipIf(MISSING, MISSING)
class Cache(unittest.TestCase):
    def test_tokens_go_to_their_places_only(self):
        cache = SlotCache(3, 8)
        rows = [Row(slot=2, start=1, first=0, count=2), Row(slot=0, start=7, first=2, count=1)]
        self.assertEqual(cache.begin(rows, "cpu").tolist(), [[1, 2, 7]])
        keys = torch.arange(1.0, 13).view(1, 2, 3, 2)
        cache.update(keys, -keys, 0)
        stored, values = cache.read(0, slice(0, 3), 8)
        self.assertTrue(torch.equal(stored, -values))
        self.assertTrue(torch.equal(stored[2, :, 1:3], keys[0, :, :2]))
        self.assertTrue(torch.equal(stored[0, :, 7], keys[0, :, 2]))
        self.assertEqual(stored.count_nonzero().item(), 12)


@unittest.skipIf(MISSING, MISSING)
class Sampling(unittest.TestCase):
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0, 0.0]])

    def drawn(self, count, **wish):
        """How often each token comes when the deciding number goes evenly from 0 to 1."""
        wishes = [{"top_p": 1, **wish, "uniform": (i + 0.5) / count} for i in range(count)]
        tokens = sampling.sample(self.logits.expand(count, -1), wishes)
        return torch.bincount(torch.tensor(tokens), minlength=5) / count

    def test_tokens_come_as_often_as_they_should(self):
        for temperature in (0.5, 1.0, 2.0):
            expected = torch.softmax(self.logits[0] / temperature, -1)
            self.assertLess((self.drawn(4000, temperature=temperature) - expected).abs().max(), 1e-3)
        self.assertGreater((self.drawn(4000, temperature=2.0) - torch.softmax(self.logits[0], -1)).abs().max(), 0.1)

    def test_the_nucleus(self):
        p = torch.softmax(self.logits[0], -1)
        expected = torch.tensor([0, p[1], p[2], 0, 0]) / (p[1] + p[2])
        self.assertLess((self.drawn(4000, temperature=1.0, top_p=0.7) - expected).abs().max(), 1e-3)
        self.assertEqual(self.drawn(100, temperature=1.0, top_p=1e-9).tolist(), [0, 1, 0, 0, 0])

    def test_a_row_is_drawn_as_if_alone(self):
        logits = torch.randn(64, 300, generator=torch.Generator().manual_seed(1))
        wishes = [{"temperature": (i % 3) / 2, "top_p": 0.2 + (i % 9) / 10, "uniform": i / 64} for i in range(64)]
        alone = [sampling.sample(logits[i : i + 1], wishes[i : i + 1])[0] for i in range(64)]
        self.assertEqual(sampling.sample(logits, wishes), alone)
        self.assertNotEqual(logits.argmax(-1).tolist(), alone)

    def test_numbers_that_float32_cannot_tell_from_0_or_1(self):
        logits = torch.tensor([[5.0, 90.0, -300.0, 89.0], [-3.0, -2.0, -torch.inf, -4.0]])
        for wish in (
            {"temperature": 1e-40, "top_p": 1, "uniform": 0.999},
            {"temperature": 5e-324, "top_p": 1, "uniform": 0.5},
            {"temperature": 1, "top_p": 1e-60, "uniform": 0.5},
            {"temperature": 0.01, "top_p": 0.5, "uniform": 1 - 2**-53},
        ):
            self.assertEqual(sampling.sample(logits, [wish] * 2), [1, 1], wish)
        wish = {"temperature": 1e-20, "top_p": 1, "uniform": 0.5}
        self.assertEqual(sampling.sample(logits * 1e30, [wish] * 2), [1, 1], "infinite once divided")

    def test_log_probabilities(self):
        own, top = sampling.log_probabilities(self.logits[0], 2, 2)
        expected = torch.log_softmax(self.logits[0], -1)
        self.assertAlmostEqual(own, expected[2].item(), places=6)
        self.assertEqual([token for token, _ in top], [1, 2])


@unittest.skipIf(MISSING, MISSING)
class Text(unittest.TestCase):
    def pieces(self, data):
        tokenizer = models.byte_tokenizer()
        detokenizer = Detokenizer(tokenizer)
        tokens = tokenizer(data).input_ids if isinstance(data, str) else data
        return [detokenizer.push(token) for token in tokens]

    def test_characters_come_whole(self):
        text = "naïve 😀 здравствуй, 世界\n"
        pieces = self.pieces(text)
        self.assertEqual("".join(piece for piece, _ in pieces), text)
        self.assertEqual(len(pieces), len(text.encode()))
        self.assertNotIn("\ufffd", "".join(piece for piece, _ in pieces))

    def test_the_end_of_an_unfinished_character_is_held(self):
        self.assertEqual(self.pieces("a😀")[1:-1], [("", "\ufffd")] * 3)

    def test_bytes_that_are_no_text_do_not_wait_for_ever(self):
        tokens = [200] * 40
        told = [bool(piece) for piece, _ in self.pieces(tokens)]
        self.assertTrue(all(any(told[i : i + LONGEST_WAIT]) for i in range(len(told) - LONGEST_WAIT)))

    def test_tokens_as_bytes(self):
        tokenizer = models.byte_tokenizer()
        text = "naïve 😀\n"
        told = [byte for token in tokenizer(text).input_ids for byte in bytes_of(tokenizer, token)]
        self.assertEqual(bytes(told), text.encode())
        self.assertEqual(bytes(bytes_of(tokenizer, 257)), models.END.encode())
        self.assertIsNone(bytes_of(tokenizer, 999))
        words = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"é": 0}, unk_token="é")))
        self.assertIsNone(bytes_of(words, 0))

    def test_the_most_bytes_of_a_token(self):
        tokenizer = models.byte_tokenizer()
        self.assertEqual(most_bytes(tokenizer), len(models.BEGIN))
        tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
        bold = "\U0001d41a" * 300
        self.assertEqual(tokenizer(bold).input_ids, tokenizer("a" * 300).input_ids)
        self.assertGreaterEqual(most_bytes(tokenizer) * 300, len(bold.encode()))
        words = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"für": 0, "a": 1}, "a")))
        self.assertGreaterEqual(most_bytes(words), 4)

    def test_the_byte_tokenizer_knows_every_text(self):
        tokenizer = models.byte_tokenizer()
        for text in ("", " ", "a\u0000b\r\n", "<|end|", "\u202e😀", "".join(map(chr, range(300)))):
            self.assertEqual(tokenizer.decode(tokenizer(text).input_ids), text)
        self.assertEqual(tokenizer.convert_tokens_to_ids([models.BEGIN, models.END, models.PAD]), [256, 257, 258])


@unittest.skipIf(MISSING, MISSING)
class Handing(unittest.TestCase):
    def test_a_call_rests_and_goes_on(self):
        rung = mock.MagicMock()
        handoff = Handoff(torch.no_grad, rung)
        self.assertIsNone(handoff.take())

        def work(a):
            self.assertFalse(torch.is_grad_enabled())
            return handoff.ask(a + 1) * handoff.ask(a + 2)

        handoff.run(work, 1)
        self.assertEqual(handoff.take(wait=True), ("asked", 2))
        handoff.answer(10)
        self.assertEqual(handoff.take(wait=True), ("asked", 3))
        handoff.answer(5)
        self.assertEqual(handoff.take(wait=True), ("done", 50))
        self.assertIsNone(handoff.take())
        handoff.run(lambda: 1 // 0)
        with self.assertRaises(ZeroDivisionError):
            handoff.take(wait=True)
        handoff.run(work, 1)
        handoff.take(wait=True)
        with self.assertRaisesRegex(KeyError, "no"):
            handoff.fail(KeyError("no"))
            handoff.take(wait=True)
        handoff.run(lambda: 7)
        self.assertEqual(handoff.take(wait=True), ("done", 7))
        handoff.run(work, 1)
        handoff.take(wait=True)
        handoff.close()
        self.assertEqual(rung.call_count, 8)


@unittest.skipIf(MISSING, MISSING)
class Shadow(unittest.TestCase):
    def setUp(self):
        model, _ = models.load("qwen3-moe", "cpu", "auto", 3, {})
        self.module = models.experts_of(model)[0]
        generator = torch.Generator().manual_seed(5)
        self.hidden = torch.randn(32, 128, generator=generator)
        self.ids = torch.stack([torch.randperm(16, generator=generator)[:4] for _ in range(32)])
        self.weights = torch.rand(32, 4, generator=generator)

    def verdict(self, spoil):
        fresh = copy.deepcopy(self.module)
        experts = Experts([fresh], lambda request: spoil(type(fresh).forward(fresh, *request[1:])))
        experts.begin("shadow", True)
        served = fresh(self.hidden, self.ids, self.weights)
        original = type(fresh).forward(fresh, self.hidden, self.ids, self.weights)
        self.assertTrue(torch.equal(served.nan_to_num(), original.nan_to_num()))
        strict(json.dumps(experts.shadow))
        return {kind: count for kind, count in experts.shadow.items() if isinstance(count, int) and count}

    def test_float64_experts(self):
        double = copy.deepcopy(self.module).double()
        double.config._experts_implementation = "eager"
        expected = double(self.hidden.double(), self.ids, self.weights.double())
        Experts([self.module], None)
        patched = self.module.forward
        exact = exact_experts(self.module, self.hidden, self.ids, self.weights)
        self.assertIs(self.module.forward, patched)
        self.assertLess(((exact - expected).norm() / expected.norm()).item(), 1e-14)

    def test_verdicts(self):
        exact = exact_experts(self.module, self.hidden, self.ids, self.weights)
        self.assertEqual(self.verdict(lambda out: out), {"identical": 1})
        self.assertEqual(self.verdict(lambda out: exact.float()), {"close": 1, "elements": 32 * 128})
        for spoil in (torch.zeros_like, lambda out: out * (1 + 1e-6), lambda out: out.roll(1, 0)):
            self.assertEqual(self.verdict(spoil), {"worse": 1, "elements": 32 * 128})
        self.assertEqual(self.verdict(lambda out: out.masked_fill(out == out.max(), float("nan"))), {"worse": 1})

    def test_where_the_original_overflows_nothing_is_said(self):
        self.hidden[0] *= 1e25
        exact = exact_experts(self.module, self.hidden, self.ids, self.weights)
        self.assertTrue(exact.isfinite().all())
        rest = {"elements": 31 * 128}
        self.assertEqual(self.verdict(lambda out: out), {"close": 1, **rest})
        self.assertEqual(self.verdict(lambda out: exact.float()), {"close": 1, **rest})
        self.assertEqual(self.verdict(torch.zeros_like), {"worse": 1, **rest})
        self.assertEqual(self.verdict(lambda out: out.index_fill(0, torch.tensor([5]), torch.inf)), {"worse": 1})
        self.hidden[:] = self.hidden[0]
        self.assertEqual(self.verdict(torch.zeros_like), {})


if __name__ == "__main__":
    unittest.main()
