"""Layers as CUDA graphs: which graph a call gets, what is in its inputs, and what becomes of a capture that fails.

Without a GPU, a recorder stands for CUDA: it runs torch's operations again, on the same memory.
"""

import contextlib
import gc
import threading
import unittest
from typing import ClassVar
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from epmoe.layer_graphs import LayerGraphs

REAL = torch.cuda.is_available()
DEVICE = "cuda" if REAL else "cpu"


class Recorder(TorchDispatchMode):
    """torch.cuda.CUDAGraph, as far as it is needed."""

    broken = False
    pool = None

    def capture_begin(self, pool, capture_error_mode):
        if pool in Cuda.recording:
            raise RuntimeError("already recording to mempool_id")
        if Cuda.users.get(pool) == 0:
            raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED: the pool was given up with its last graph")
        Cuda.recording.add(pool)
        Cuda.users[pool] = Cuda.users.get(pool, 0) + 1
        self.calls, self.pool = [], pool
        self.__enter__()

    def __del__(self):
        if self.pool is not None:
            Cuda.users[self.pool] -= 1

    def capture_end(self):
        self.__exit__(None, None, None)
        if self.broken:
            raise RuntimeError("the capture was invalidated")
        Cuda.recording.discard(self.pool)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    @torch.inference_mode()  # a replay cares for no mode of torch's
    def replay(self):
        for function, args, kwargs, result in self.calls:
            again = function(*args, **kwargs)
            if isinstance(again, torch.Tensor) and again.data_ptr() != result.data_ptr():
                result.copy_(again)


class Cuda:
    """torch.cuda, as far as it is needed, with a stream for each thread."""

    recording: ClassVar[set] = set()
    users: ClassVar[dict] = {}
    handles = 0

    class Stream:
        def wait_stream(self, other):
            pass

    class Event:
        def wait(self, stream):
            pass

        def record(self, stream):
            pass

    streams = threading.local()
    CUDAGraph = Recorder
    device = staticmethod(lambda device: contextlib.nullcontext())
    stream = staticmethod(lambda stream: contextlib.nullcontext())

    @classmethod
    def current_stream(cls, device=None):
        if not hasattr(cls.streams, "own"):
            cls.streams.own = cls.Stream()
        return cls.streams.own

    @staticmethod
    def is_current_stream_capturing():
        return False

    @classmethod
    def graph_pool_handle(cls):
        cls.handles += 1
        return cls.handles


def layer(hidden, ids, weights, shared, residual):
    """Tells everything that it was given apart; tokens without experts are what is added."""
    chosen = (ids >= 0).float()
    rows = hidden * ((ids.float() + 2) * chosen * weights).sum(1, keepdim=True)
    for added in (shared, residual):
        rows = rows if added is None else rows * 3 + added
    return rows


def call(count, topk=4, ids=torch.int64, added=False):
    return [
        torch.randn(count, 16, device=DEVICE),
        torch.randint(-1, 8, (count, topk), dtype=ids, device=DEVICE),
        torch.rand(count, topk, device=DEVICE),
        *(torch.randn(count, 16, device=DEVICE) if added else None for _ in range(2)),
    ]


class Graphs(unittest.TestCase):
    def setUp(self):
        if not REAL:
            ended = lambda device, handle: Cuda.recording.discard(handle)
            names = ("Stream", "Event", "CUDAGraph", "device", "stream", "current_stream", "graph_pool_handle")
            played = {name: getattr(Cuda, name) for name in (*names, "is_current_stream_capturing")}
            for patch in (
                mock.patch.multiple(torch.cuda, **played),
                mock.patch("torch._C._cuda_endAllocateToPool", ended, create=True),
                mock.patch("torch.Tensor.record_stream", lambda self, stream: None),
            ):
                patch.start()
                self.addCleanup(patch.stop)
        self.captures = 0

    def forward(self, graphs, given, output=None, body=layer):
        """As src/moe/graphs.ts does it."""
        result = graphs.replay(output, *given)
        if result is not None:
            return result
        inputs = graphs.prepare(*given)
        if inputs is None:
            return None
        body(*inputs)
        graphs.begin()
        self.captures += 1
        try:
            made = body(*inputs)
        except ArithmeticError:
            graphs.abandon()
            raise
        graphs.end(made)
        return graphs.replay(output, *given)

    def check(self, graphs, given):
        expected = layer(*given)
        torch.testing.assert_close(self.forward(graphs, given), expected, rtol=0, atol=0)
        output = torch.full_like(expected, torch.nan)
        self.assertIs(self.forward(graphs, given, output), output)
        torch.testing.assert_close(output, expected, rtol=0, atol=0)

    def test_sizes_share_graphs(self):
        graphs = LayerGraphs(24, [])
        for count, captures in (
            (1, 1),
            (5, 2),
            (8, 2),
            (6, 2),
            (24, 3),
            (17, 3),
            (2, 4),
            (1, 4),
            (3, 5),
            (9, 6),
            (16, 6),
        ):
            self.check(graphs, call(count))
            self.assertEqual(self.captures, captures, count)

    def test_kinds_do_not(self):
        graphs = LayerGraphs(8, [])
        kinds = [{}, {"topk": 2}, {"ids": torch.int32}, {"added": True}]
        for _ in range(2):
            for kind in kinds:
                self.check(graphs, call(3, **kind))
        self.assertEqual(self.captures, len(kinds))

    def test_no_graph_for_none_too_many_or_inside_another_capture(self):
        graphs = LayerGraphs(4, [])
        for count in (0, 5, 1000):
            self.assertIsNone(self.forward(graphs, call(count)))
        self.check(graphs, call(4))
        with mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True):
            for count in (4, 2):
                self.assertIsNone(self.forward(graphs, call(count)))
        self.assertEqual(self.captures, 1)

    def test_tokens_that_are_missing_have_no_experts(self):
        graphs = LayerGraphs(8, [])
        seen = []

        def body(hidden, ids, *rest):
            seen.append(ids)
            return layer(hidden, ids, *rest)

        for count in (5, 8, 5, 7, 6):
            given = call(count)
            self.forward(graphs, given, body=body)
            torch.testing.assert_close(seen[0][:count], given[1], rtol=0, atol=0)
            self.assertTrue((seen[0][count:] == -1).all(), count)

    def test_what_is_returned_stays_as_it_was(self):
        graphs = LayerGraphs(8, [])
        given = call(3)
        result = self.forward(graphs, given)
        expected = result.clone()
        for _ in range(3):
            self.forward(graphs, call(4))
        torch.testing.assert_close(result, expected, rtol=0, atol=0)

    def test_a_body_that_fails_leaves_the_others_as_they_were(self):
        graphs = LayerGraphs(8, [])
        self.check(graphs, call(8))
        failing = [False, True, False, True]

        def body(*inputs):
            if failing.pop(0):
                raise ArithmeticError
            return layer(*inputs)

        for _ in range(2):
            with self.assertRaises(ArithmeticError):
                self.forward(graphs, call(2), body=body)
        self.check(graphs, call(8))
        self.check(graphs, call(2))
        self.check(LayerGraphs(8, []), call(8))

    def test_a_pool_outlives_no_graph(self):
        """One that torch has given up must not be found again, whoever was about to capture into it."""
        first, second = LayerGraphs(8, []), LayerGraphs(8, [])
        self.check(first, call(8))

        def body(*inputs):
            raise ArithmeticError

        with self.assertRaises(ArithmeticError):
            self.forward(second, call(8), body=body)
        del first
        gc.collect()
        self.check(second, call(8))
        self.check(LayerGraphs(8, []), call(8))

    def test_calls_in_and_out_of_inference_mode_share_a_graph(self):
        graphs = LayerGraphs(8, [])
        for mode in (True, False, True):
            with torch.inference_mode(mode):
                self.check(graphs, call(8))
        self.assertEqual(self.captures, 1)

    @unittest.skipIf(REAL, "the recorder is told to fail")
    def test_a_capture_that_cuda_gives_up_is_told_and_others_go_on(self):
        graphs = LayerGraphs(8, [])
        self.check(graphs, call(8))
        with mock.patch.object(Recorder, "broken", True):
            with self.assertRaisesRegex(RuntimeError, "invalidated"):
                self.forward(graphs, call(2))

            failing = [False, True]

            def body(*inputs):
                if failing.pop(0):
                    raise ArithmeticError
                return layer(*inputs)

            with self.assertRaises(ArithmeticError):
                self.forward(graphs, call(2), body=body)
        self.assertEqual(Cuda.recording, set())
        self.check(graphs, call(8))
        self.check(graphs, call(2))

    def test_threads_take_turns(self):
        graphs = [LayerGraphs(8, []) for _ in range(2)]
        for each in graphs:
            self.check(each, call(8))
        wrong = []

        def run(own):
            for _ in range(200):
                given = call(1 + torch.randint(0, 8, ()).item())
                each = graphs[own % 2]
                result = each.replay(None, *given)
                if result is not None and not torch.equal(result, layer(*given)):
                    wrong.append(own)

        threads = [threading.Thread(target=run, args=(own,)) for own in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(wrong, [])


if __name__ == "__main__":
    unittest.main()
