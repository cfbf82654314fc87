"""A group of ranks on torch.distributed for expert parallelism: joining, agreeing, moving rows, and never hanging.

torch.distributed does the communication: NCCL between GPUs, gloo between CPUs. What is added is that every wait ends:
with the result, or within the timeout with an :class:`EpmoeError`. It names the rank to blame (``epmoe._watch``) but
where all are in the call and alive, and one is merely slow.
"""

import atexit
import contextlib
import datetime
import functools
import json
import os
import time

import torch
import torch.distributed as dist

from epmoe._watch import Watch
from epmoe.errors import EpmoeError

__all__ = ["RankGroup", "join_ranks"]

_NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def join_ranks(*, backend=None, world_size=None, timeout=30.0, group=None):
    """Joins the job that torchrun has started this process for; every rank must call it.

    ``backend`` is ``"nccl"`` or ``"gloo"`` (default: NCCL where torch has it and a GPU), ``world_size`` what the
    program expects, ``timeout`` seconds after which no rank is waited for any more. ``group`` is a process group of
    torch.distributed to work in, of which this rank is a member; without it, all ranks, and torch.distributed is
    initialised where it is not. Raises ERR_RANKS_START.
    """
    rank, size, address, port = _environment()
    if world_size is not None and world_size != size:
        raise _start_error(
            f"{world_size} ranks, as world_size says", f"WORLD_SIZE={size}", "Start as many with --nproc-per-node"
        )
    store = _store_of_job(rank, address, port, timeout)
    if not dist.is_initialized():
        backend = backend or ("nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo")
        device = _device(backend)
        store.meet(range(size), "joined", store.prefixed("join"), timeout)
        dist.init_process_group(
            backend,
            store=store.prefixed("torch"),
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(seconds=2 * timeout),  # this module's own comes first, and names the rank
            **({"device_id": device} if device.type == "cuda" else {}),
        )
        atexit.register(_end)
    elif backend is not None and dist.get_backend(group) != backend:
        raise _start_error(f"a group on {backend}", f"one on {dist.get_backend(group)}", "Leave the backend out")
    group = group or dist.group.WORLD
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise _start_error("a group that this rank is in", "one of other ranks", "Join on the group's own ranks only")
    joined = RankGroup(group, store, timeout)
    _groups.append(joined)
    return joined


class RankGroup:
    """Made by :func:`join_ranks`. ``rank`` and ``size`` are counted in the group, ``ranks`` in the job."""

    def __init__(self, group, store, timeout):
        self._group, self.timeout = group, timeout
        self.ranks = dist.get_process_group_ranks(group)
        self.rank, self.size = dist.get_rank(group), len(self.ranks)
        self.backend = dist.get_backend(group)
        self.device = str(_device(self.backend))
        name = f"group-{'-'.join(map(str, self.ranks))}-{_count(self.ranks)}"
        self._store = store.prefixed(name)
        self._meetings = 0
        self._most_counts = 1
        self._watch = Watch(lambda patience: store.another(name, patience), store.host, store.rank, self.ranks, timeout)
        store.meet(self.ranks, "joined the group", self._store, timeout)
        self._watch.start()

    def gather(self, what, value):
        """Every rank's value (JSON), in the order of ranks. It goes through the store: for what is rare.

        ``what`` they meet for, in words, has to be the same: ERR_RANKS_DISAGREE.
        """
        self._watch.must_be_whole()
        self._meetings += 1
        key, missing = f"meeting-{self._meetings}", set(range(self.size))
        deadline = time.monotonic() + self.timeout
        try:
            self._store.set(f"{key}/{self.rank}", json.dumps([what, value]))
            while missing := {rank for rank in missing if not self._store.check([f"{key}/{rank}"])}:
                self._check_meeting(missing, deadline)
                time.sleep(0.005)
            told = [json.loads(self._store.get(f"{key}/{rank}")) for rank in range(self.size)]
            # Whoever has come to this meeting has read everything of the one before.
            self._store.delete_key(f"meeting-{self._meetings - 1}/{self.rank}")
        except dist.DistError as error:
            raise self._watch.diagnose(error) from error
        self.must_be_same("", "step", [each[0] for each in told])
        return [each[1] for each in told]

    def _check_meeting(self, missing, deadline):
        # Not every lost rank is missing here, but who keeps the store need not be a rank of the group.
        if any(rank not in self.ranks or self.ranks.index(rank) in missing for rank in self._watch.lost()):
            self._watch.check(deadline)
        if time.monotonic() > deadline:
            names = ", ".join(str(self.ranks[rank]) for rank in sorted(missing))
            raise EpmoeError(
                "ERR_RANK_LATE",
                op="expert_parallel",
                expected=f"every rank within {self.timeout:g} s",
                received=f"nothing from rank {names}",
                hint="Every rank makes the same layers, in the same order",
            )

    def enter(self):
        """Begins a call, which every rank makes."""
        self._watch.enter()

    def leave(self):
        """Ends it."""
        event = None
        if self.device != "cpu" and not torch.cuda.is_current_stream_capturing():
            event = torch.cuda.Event()
            event.record()
        self._watch.leave(event)

    def fail(self, message):
        """Tells the others that this rank takes no further part in the call, nor in any other."""
        error = EpmoeError(
            "ERR_RANK_LOST",
            op="expert_parallel",
            expected="no call after one that failed",
            received=message,
            hint="The ranks are out of step: end the job",
        )
        self._watch.fail(error, {self._watch.rank: f"failed in call {self._watch.calls}: {message}"})

    def expect(self, counts):
        """From now on an agreement may have so many counts; every rank says so at the same step."""
        self._most_counts = max(self._most_counts, counts)

    def agree(self, layer, topk, counts):
        """Before a call, tells each rank its counts and learns theirs; the host waits. Returns both, a list a rank.

        counts [W, n], int64: n up to what :meth:`expect` has said. All ranks have to be in the same call of the same
        layer, with as many slots a token: ERR_RANKS_DISAGREE. If one of them has declined, it is ERR_RANK_REFUSED.
        """
        received, sent = self._exchanged(True, layer, topk, counts)
        self.must_be_same("topk_ids", "slots a token", [row[3] for row in received])
        return [[row[-counts.shape[1] :] for row in rows] for rows in (received, sent)]

    def agree_on(self, layer, topk, tokens):
        """:meth:`agree` for ranks that have to bring as many tokens each."""
        counts = torch.full((self.size, 1), tokens, dtype=torch.int64, device=self.device)
        received, _ = self.agree(layer, topk, counts)
        self.must_be_same("hidden_states", "tokens", [row[0] for row in received])

    def decline(self, layer, message):
        """In place of :meth:`agree`: this rank cannot make the call, and every rank is told why."""
        self._store.set(self._refusal(self.rank), message)
        self._exchanged(False, layer, 0, torch.zeros(self.size, 1, dtype=torch.int64, device=self.device))

    def _exchanged(self, able, layer, topk, counts):
        """Rows [call, able, layer, topk, 0 ..., counts ...] from and to each rank, of one length whatever the call."""
        head = _head(self.size, able, layer, topk, self._most_counts - counts.shape[1], counts.device)
        rows = torch.cat([counts.new_full((self.size, 1), self._watch.calls), head, counts], dim=1)
        both = torch.stack([rows, rows])  # one trip to the host for what came and what went
        self.wait(self.all_to_all(both[0], rows, None, None))
        received, sent = self.on_host(both)
        calls = [row[0] for row in received]
        if len(set(calls)) > 1:
            raise self._watch.fail(self._differ("", "number of calls", calls, "The ranks are out of step: end the job"))
        refused = [rank for rank, row in enumerate(received) if not row[1]]
        if refused:
            told = [f"rank {self.ranks[rank]}: {self._store.get(self._refusal(rank)).decode()}" for rank in refused]
            raise EpmoeError(
                "ERR_RANK_REFUSED",
                op="expert_parallel",
                expected="a call that every rank can make",
                received="; ".join(told),
                hint="Nothing was computed, and the group goes on with the next call",
            )
        self.must_be_same("", "layer", [row[2] for row in received])
        return received, sent

    def _refusal(self, rank):
        """Where the reason is. Whoever has come to a call has read all that was written in the one before the last."""
        return f"refusal-{self._watch.calls % 2}/{rank}"

    def must_be_same(self, argument, what, values):
        """Raises ERR_RANKS_DISAGREE, on every rank alike, unless the ranks' values are one."""
        if len(set(values)) > 1:
            raise self._differ(argument, what, values, "Nothing was computed")

    def _differ(self, argument, what, values, hint):
        told = ", ".join(f"rank {rank} has {value}" for rank, value in zip(self.ranks, values, strict=True))
        return EpmoeError(
            "ERR_RANKS_DISAGREE",
            op="expert_parallel",
            argument=argument,
            expected=f"the same {what} on every rank",
            received=told,
            hint=hint,
        )

    def on_host(self, tensor):
        """``tensor.tolist()`` that does not wait for ever."""
        if tensor.is_cuda:
            host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
            host.copy_(tensor, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            deadline, polls = time.monotonic() + self.timeout, 0
            while not self._is_done(event):
                polls += 1
                if polls > 1000:
                    self._check(deadline)
                    time.sleep(5e-5)
            tensor = host
        return tensor.tolist()

    def _is_done(self, event):
        """A rank that is gone may also fail the GPU's work of those that share memory with it, which names nobody."""
        with self._diagnosed():
            return event.query()

    @contextlib.contextmanager
    def _diagnosed(self):
        try:
            yield
        except RuntimeError as error:
            raise self._watch.diagnose(error) from error

    def all_reduce(self, tensor, in_float32):
        """Sums over the ranks, in place and under way; :meth:`wait` for the result."""
        summed = tensor.float() if in_float32 else tensor
        summed = summed.cpu() if self._staged(tensor) else summed
        work = dist.all_reduce(summed, group=self._group, async_op=True)
        return _Work(work, None if summed is tensor else (tensor, summed), (summed,))

    def all_to_all(self, output, rows, output_splits, splits):
        """Sends ``splits[r]`` rows to each rank r and receives ``output_splits[r]``; rows lie in the order of ranks."""
        sent, received = rows, output
        if self._staged(rows):
            sent, received = rows.cpu(), torch.empty(output.shape, dtype=output.dtype, device="cpu")
        work = dist.all_to_all_single(
            _bytes(received), _bytes(sent), output_splits, splits, group=self._group, async_op=True
        )
        return _Work(work, None if received is output else (output, received), (sent, received))

    def wait(self, work):
        """Until the result is there: on the host with gloo, in the current stream with NCCL."""
        if self.backend == "nccl":
            with self._diagnosed():
                work.handle.wait()
        else:
            self._wait_on_host(work)
        if work.copy is not None:
            target, result = work.copy
            target.copy_(result)

    def _wait_on_host(self, work):
        deadline = time.monotonic() + self.timeout
        slice_ = datetime.timedelta(seconds=self._watch.interval)
        while True:
            ended = work.handle.is_completed()
            try:
                work.handle.wait(slice_)
                return
            except RuntimeError as error:
                # A wait that has run out of time raises as one for a collective that has failed.
                if ended:
                    raise self._watch.diagnose(error) from error
                self._check(deadline)

    @property
    def broken(self):
        """Whether a call has failed, after which no other can be made."""
        return self._watch.broken is not None

    def close(self):
        """This rank leaves; the others may finish the calls it has taken part in."""
        self._watch.stop()
        if not self.broken and self in _groups:
            _groups.remove(self)

    def _check(self, deadline):
        try:
            self._watch.check(deadline)
        except EpmoeError:
            if self.backend == "nccl" and hasattr(self._group, "abort"):
                self._group.abort()  # or the GPU would never be done
            raise

    def _staged(self, tensor):
        """gloo exchanges rows of the CPU only: those of a GPU go through the host."""
        return tensor.is_cuda and self.backend != "nccl"


class _Work:
    """A collective under way. It keeps the tensors that it reads and writes alive."""

    def __init__(self, handle, copy, tensors):
        self.handle, self.copy, self.tensors = handle, copy, tensors


class _Store:
    """The job's key-value store, which torchrun's agent or rank 0 keeps."""

    def __init__(self, rank, address, port, timeout):
        self.rank, self._address, self._port = rank, address, port
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self.host = (-1, f"torchrun's store on {address}:{port}") if agent else (0, "and the store that it keeps")
        self._attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = self._connect(datetime.timedelta(seconds=timeout), rank == 0 and not agent)

    def prefixed(self, name):
        return dist.PrefixStore(f"epmoe/{self._attempt}/{name}", self._store)

    def another(self, name, timeout):
        """A connection of its own: one that waits would hold up a shared one."""
        return dist.PrefixStore(f"epmoe/{self._attempt}/{name}", self._connect(timeout, False))

    def meet(self, ranks, what, store, timeout):
        """Waits until all these ranks are there; ERR_RANKS_START names those that are not.

        The store itself is gone when rank 0 has waited long enough: whom it missed are those not seen here either.
        """
        deadline = time.monotonic() + timeout
        missing = list(ranks)
        with contextlib.suppress(dist.DistError):
            store.set(f"{what}/{self.rank}", "")
            while time.monotonic() < deadline:
                missing = [rank for rank in missing if not store.check([f"{what}/{rank}"])]
                if not missing:
                    return
                time.sleep(0.01)
        raise _start_error(
            f"{len(ranks)} ranks within {timeout:g} s",
            f"nothing from rank {', '.join(map(str, missing))}",
            "Start every rank of WORLD_SIZE, or say how many there are; a longer timeout gives them more time",
        )

    def _connect(self, timeout, host):
        try:
            return dist.TCPStore(
                self._address, self._port, None, host, timeout, wait_for_workers=False, multi_tenant=True
            )
        except Exception as cause:
            raise _start_error(
                f"the job's store at {self._address}:{self._port} within {timeout.total_seconds():g} s",
                str(cause).split("\n")[0],
                "MASTER_ADDR and MASTER_PORT must name rank 0's machine, and rank 0 must run",
            ) from cause


_groups = []
_counts = {}
_stores = {}


def _store_of_job(rank, address, port, timeout):
    """One for all groups: rank 0 may keep it, and has to for as long as the job lasts."""
    if (address, port) not in _stores:
        _stores[address, port] = _Store(rank, address, port, timeout)
    return _stores[address, port]


def _count(ranks):
    """How often a group of these ranks was joined before."""
    _counts[tuple(ranks)] = _counts.get(tuple(ranks), -1) + 1
    return _counts[tuple(ranks)]


def _environment():
    """What torchrun tells each process."""
    missing = [name for name in _NAMES if not os.environ.get(name)]
    if missing:
        raise _start_error(
            "a process that torchrun has started",
            f"no {', '.join(missing)} in the environment",
            "Run `torchrun --no-python --standalone --nproc-per-node N node program.js`",
        )
    try:
        rank, size, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    except ValueError as cause:
        raise _start_error("numbers in RANK, WORLD_SIZE and MASTER_PORT", str(cause), "torchrun sets them") from cause
    if not 0 <= rank < size:
        raise _start_error("RANK below WORLD_SIZE", f"RANK={rank}, WORLD_SIZE={size}", "torchrun sets both")
    return rank, size, os.environ["MASTER_ADDR"], port


def _device(backend):
    """The rank's own: with NCCL the GPU of its place on the machine, made the current one."""
    if backend != "nccl":
        return torch.device("cpu")
    local, count = int(os.environ.get("LOCAL_RANK", os.environ["RANK"])), torch.cuda.device_count()
    if local >= count:
        raise _start_error(
            "a GPU for each rank of the machine, for NCCL",
            f"LOCAL_RANK={local} with {count} GPUs",
            "Start no more ranks than there are GPUs, or choose backend 'gloo'",
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


@functools.lru_cache(maxsize=1024)  # more than models have layers, or each call would copy its own to the GPU
def _head(size, able, layer, topk, unused, device):
    """[W, 3 + unused]: the part of an agreement's rows that a layer's calls have in common."""
    return torch.tensor([[able, layer, topk, *[0] * unused]], dtype=torch.int64, device=device).repeat(size, 1)


def _bytes(tensor):
    """Rows as bytes: the exchange has nothing to do with their dtype."""
    return tensor.view(torch.uint8) if tensor.dim() > 1 and tensor.dtype != torch.uint8 else tensor


def _end():
    """At the end of the process. A group with a dead rank is not taken apart: that would wait for the dead."""
    for group in list(_groups):
        group.close()
    if dist.is_initialized() and not any(group.broken for group in _groups):
        dist.destroy_process_group()


def _start_error(expected, received, hint):
    return EpmoeError("ERR_RANKS_START", op="join_ranks", expected=expected, received=received, hint=hint)
