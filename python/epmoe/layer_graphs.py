"""A layer's calls of few tokens as CUDA graphs: for the host a call is then a few copies and one launch.

JavaScript does what a layer does; this keeps the graphs, and the memory between them and their callers.
"""

import contextlib
import threading
import weakref

import torch

__all__ = ["LayerGraphs"]


class LayerGraphs:
    """The graphs of one layer, by number of tokens and by kind of arguments.

    ``given`` are hidden_states [T, H], topk_ids [T, K], topk_weights [T, K] and what is added to the sum, shared_output
    and residual [T, H], each of which may be None. There are graphs for T from 1 to ``most``. Numbers of tokens between
    two powers of two share one: the tokens that are missing have no experts.

    A call for which :meth:`replay` has no graph is captured: :meth:`prepare` gives tensors in the place of ``given``,
    the layer computes with them once to load its kernels, and once between :meth:`begin` and :meth:`end`.
    """

    def __init__(self, most, weights):
        """``weights`` are the tensors that graphs read in place: they live as long as these."""
        self._most, self._weights = most, weights
        self._graphs = {}
        self._next = None

    def replay(self, output, *given):
        """The layer's result, in ``output`` or, for None, in a tensor of its own; None where there is no graph."""
        graph = self._graphs.get(self._kind(given))
        if graph is None:
            return None
        with torch.cuda.device(given[0].device):
            # The launch would become a part of the caller's graph, which may outlive this one.
            return None if torch.cuda.is_current_stream_capturing() else graph.replay(output, given)

    def prepare(self, *given):
        """The tensors to compute with; None for too many tokens, and while the caller's stream is itself captured."""
        kind = self._kind(given)
        with torch.cuda.device(given[0].device):
            if kind is None or torch.cuda.is_current_stream_capturing():
                return None
            self._next = kind, _Graph(kind[0], given)
        return self._next[1].inputs

    def begin(self):
        self._next[1].begin()

    def end(self, output):
        """``output`` is what the layer returned."""
        (kind, graph), self._next = self._next, None
        graph.end(output)
        self._graphs[kind] = graph

    def abandon(self):
        """Instead of :meth:`end`, when the layer could not be captured; tells what CUDA has to say of it, or None."""
        (_, graph), self._next = self._next, None
        return graph.abandon()

    def _kind(self, given):
        count = given[0].shape[0]
        if not 0 < count <= self._most:
            return None
        size = min(1 << (count - 1).bit_length(), self._most)
        return size, *(each if each is None else (each.dtype, each.shape[1]) for each in given)


class _Graph:
    """One graph with its inputs and its output, [size, ...] each."""

    def __init__(self, size, given):
        with torch.inference_mode(False):  # or they could not be written to outside of it
            self.inputs = [each if each is None else each.new_zeros(size, each.shape[1]) for each in given]
        self._device = given[0].device
        self._ids = self.inputs[1].fill_(-1)
        self._filled = 0
        self._output = None
        self._streams = {torch.cuda.current_stream(self._device)}
        self._pool = None
        self._graph = torch.cuda.CUDAGraph()
        self._capture = contextlib.ExitStack()

    def begin(self):
        with self._capture as stack:
            stack.enter_context(torch.cuda.device(self._device))
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            stack.enter_context(torch.cuda.stream(stream))
            pool = _pools.get(self._device) or _Pool()
            # What other threads do meanwhile is their own affair.
            self._graph.capture_begin(pool=pool.handle, capture_error_mode="thread_local")
            self._pool = _pools[self._device] = pool
            self._capture = stack.pop_all()

    def end(self, output):
        self._end()
        self._output = output

    def abandon(self):
        try:
            self._end()
        except RuntimeError as error:
            return str(error)

    def _end(self):
        try:
            with self._capture:
                self._graph.capture_end()
        except RuntimeError:
            # torch goes on to give this stream memory of the pool, and lets nobody else capture into it.
            torch._C._cuda_endAllocateToPool(self._device.index, self._pool.handle)
            _pools.pop(self._device, None)
            raise

    def replay(self, output, given):
        count = given[0].shape[0]
        with self._pool.held() as stream:
            self._keep_for(stream)
            for mine, theirs in zip(self.inputs, given, strict=True):
                if mine is not None:
                    mine[:count].copy_(theirs)
            if count < self._filled:
                self._ids[count : self._filled].fill_(-1)
            self._filled = count
            self._graph.replay()
            result = self._output[:count]
            return result.clone() if output is None else output.copy_(result)

    def _keep_for(self, stream):
        """Has torch give the inputs' memory to nobody before the stream is done with it."""
        if stream in self._streams:
            return
        self._streams.add(stream)
        for each in self.inputs:
            if each is not None:
                each.record_stream(stream)


class _Pool:
    """Memory for the intermediate results of all layers' graphs on one device, of which one runs at a time."""

    def __init__(self):
        self.handle = torch.cuda.graph_pool_handle()
        self._lock = threading.Lock()
        self._stream = None
        self._done = torch.cuda.Event()

    @contextlib.contextmanager
    def held(self):
        """For one replay on the current stream, which waits for what another one does with this memory."""
        stream = torch.cuda.current_stream()
        with self._lock:
            if stream != self._stream:
                self._done.wait(stream)
                self._stream = stream
            try:
                yield stream
            finally:
                self._done.record(stream)


# torch gives a pool up with its last graph, and its handle is of no use then: only graphs that use it keep it here.
_pools = weakref.WeakValueDictionary()
