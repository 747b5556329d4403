"""Tiers, pool, file and streams: room, reuse, and every way in which a copy can fail."""

# ruff: noqa: SIM117 (the order of contexts is what is tested)

from __future__ import annotations

import errno
import gc
import os
import random
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from fuzz import examples
from hypothesis import given
from hypothesis import strategies as st
from offload_helpers import make_zoo, token_ids

from hdp.offload import FileTier, HostTier, OffloadEngine, OffloadError, measure_bandwidth
from hdp.offload.buffers import PAGE, BufferPool, round_to_page
from hdp.offload.extents import ExtentMap
from hdp.offload.file_tier import CHUNK, checksum
from hdp.offload.split import Split, flat_bytes, is_dense, make_split
from hdp.offload.streams import Copies, CudaStream, ThreadStream
from hdp.offload.tiers import Chain

TOKENS = 48

# ---------------------------------------------------------------- pool


def test_buffers_are_exact_to_the_page_and_reused():
    pool = BufferPool()
    buffer = pool.acquire(70_000)
    assert buffer.size == round_to_page(70_000) == 73_728
    assert buffer.tensor.data_ptr() % PAGE == 0
    pool.release(buffer)
    assert pool.acquire(66_000) is buffer  # an eighth too large at most
    pool.release(buffer)
    small = pool.acquire(40_000)  # too small for the free one, which is more than an eighth above the most in use
    assert small is not buffer and pool.owned == 40_960


def test_pool_stays_within_an_eighth_of_the_most_in_use():
    """Lengths change from micro-batch to micro-batch: buffers of old sizes are given up, not hoarded."""
    pool, rng = BufferPool(), random.Random(0)
    for _ in range(300):
        scale = rng.uniform(0.2, 1.0)
        held = [pool.acquire(int(scale * n)) for n in (500_000, 200_000, 200_000, 60_000)]
        rng.shuffle(held)
        for buffer in held:
            pool.release(buffer)
        assert pool.owned <= pool.peak_used * 9 / 8
    pool.trim()
    assert pool.owned == pool.used == 0


def test_pool_keeps_its_budget():
    pool = BufferPool(budget=100_000)
    first = pool.acquire(60_000)
    assert pool.acquire(60_000) is None
    pool.release(first)
    assert pool.acquire(90_000) is not None and pool.owned <= 100_000
    with pytest.raises(ValueError, match="budget is -1 bytes"):
        BufferPool(budget=-1)


def test_leases_come_back_when_their_storage_is_freed():
    pool = BufferPool()
    tensor = pool.lease(8192)
    view = torch.empty(0).set_(tensor.untyped_storage(), 16, (4, 8), (8, 1))
    del tensor
    assert pool.used == 8192
    del view
    assert pool.used == 0 and pool.owned == 8192


# ---------------------------------------------------------------- extents


@examples(60)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 20_000)), max_size=60), st.randoms(use_true_random=False))
def test_extents_never_overlap_and_join_again(steps, rng):
    extents, held = ExtentMap(block=PAGE), []
    for take, size in steps:
        if take or not held:
            offset, length = extents.take(size)
            assert length >= size and offset % PAGE == length % PAGE == 0
            assert all(offset + length <= o or o + n <= offset for o, n in held)
            held.append((offset, length))
        else:
            extents.give(*held.pop(rng.randrange(len(held))))
        assert extents.used == sum(n for _, n in held) <= extents.end
        assert extents.end == max((o + n for o, n in held), default=0)
    for extent in held:
        extents.give(*extent)
    assert extents.end == extents.used == 0 and extents._by_offset == []


# ---------------------------------------------------------------- what leaves


@examples(80)
@given(
    st.integers(1, 5), st.integers(1, 400), st.sampled_from([1, 3, 16, 64]), st.floats(0, 1),
    st.sampled_from([(0, 1, 2), (1, 0, 2), (2, 1, 0)]), st.booleans(),
)  # fmt: skip
def test_split_covers_every_byte_once(heads, tokens, width, ratio, order, told):
    tensor = torch.randn(heads, tokens, width).permute(order)
    split = make_split(tensor, ratio, tokens if told else None)
    assert is_dense(tensor)
    seen = np.zeros(split.nbytes, dtype=int)
    for at, _, size in (*split.runs(), *split.rest_runs()):
        seen[at : at + size] += 1
    assert (seen == 1).all() and split.away + split.rest == split.nbytes
    positions = [(to, size) for _, to, size in split.runs()]
    assert [to for to, _ in positions] == list(np.cumsum([0, *(size for _, size in positions)])[:-1])
    flat = flat_bytes(tensor).numpy()
    for start in range(0, split.away, 1000):
        stop = min(start + 1000, split.away)
        part = [flat[at : at + size] for at, _, size in split.runs(start, stop)]
        whole = np.concatenate([flat[at : at + size] for at, _, size in split.runs()])
        assert (np.concatenate(part) == whole[start:stop]).all()


def test_whole_tokens_leave():
    rows = torch.randn(1, 100, 64)
    assert make_split(rows, 0.3, 100) == Split(25_600, 1, 30 * 256)
    heads = torch.randn(1, 4, 100, 64)  # tokens are not outermost: the first 30 of each head
    assert make_split(heads, 0.3, 100) == Split(102_400, 4, 30 * 256)
    packed = torch.randn(1, 100, 4, 64).transpose(1, 2)  # the usual attention layout: one block
    assert make_split(packed, 0.3, 100) == Split(102_400, 1, 30 * 1024)
    part = rows[:, :50]  # does not fill its storage: bytes
    assert make_split(part, 0.3, 50).away == 7680
    assert make_split(rows, 0.3, 77).away == 7680


# ---------------------------------------------------------------- tiers


@pytest.mark.parametrize("kind", ["host", "file", "named", "buffered"])
@pytest.mark.parametrize("nbytes", [1, 4096, 5000, 2 * CHUNK, CHUNK + 12_345])
@pytest.mark.parametrize("outer", [1, 3])
def test_tiers_give_back_what_they_got(tmp_path, kind, nbytes, outer):
    tier = {
        "host": HostTier,
        "file": lambda: FileTier(tmp_path),
        "named": lambda: FileTier(tmp_path, named=True),
        "buffered": lambda: FileTier(tmp_path, direct=False),
    }[kind]()
    total = nbytes * outer
    split = Split(total, outer, max(1, nbytes * 2 // 3))
    source = torch.randint(0, 256, (total,), dtype=torch.uint8)
    slots = [tier.reserve(split.away) for _ in range(2)]
    for i, slot in enumerate(slots):
        tier.write(slot, source + i, split)
    pool = BufferPool()
    for target in (pool.lease(total), torch.empty(total, dtype=torch.uint8)):  # aligned for a straight read, and not
        for i, slot in enumerate(slots):
            target.fill_(7)
            tier.read(slot, target, split)
            for at, _, size in split.runs():
                assert torch.equal(target[at : at + size], source[at : at + size] + i)
            for at, _, size in split.rest_runs():
                assert (target[at : at + size] == 7).all()
    for slot in slots:
        tier.release(slot)
    assert tier.used == 0
    tier.trim()
    assert tier.owned == 0
    tier.close()
    assert list(tmp_path.iterdir()) == []


def test_chain_fills_its_tiers_in_order(tmp_path):
    chain = Chain([HostTier(budget=2 * PAGE), FileTier(tmp_path, budget=PAGE)])
    assert chain.room == 3 * PAGE * 8 // 9
    assert [chain.reserve(PAGE).tier.name for _ in range(3)] == ["host", "host", "disk"]
    assert chain.reserve(1) is None and chain.room == 0
    assert "host holds 8192 of 8192 bytes, disk holds 4096 of 4096 bytes" in str(chain.full(1))
    assert Chain([HostTier(), FileTier(tmp_path, budget=PAGE)]).room is None
    with pytest.raises(ValueError, match="no tier given"):
        Chain([])
    with pytest.raises(ValueError, match="two tiers have the same name"):
        Chain([HostTier(), HostTier()])


def test_checksum_sees_a_bit_swapped_sectors_and_odd_ends():
    data = np.random.default_rng(0).integers(0, 256, 10_003, dtype=np.uint8)
    before = checksum(data)
    for at in (0, 5_000, 10_002):
        data[at] ^= 4
        assert checksum(data) != before
        data[at] ^= 4
    assert checksum(data) == before
    first, third = data[:512].copy(), data[1024:1536].copy()
    data[:512], data[1024:1536] = third, first
    assert checksum(data) != before
    whole = np.random.default_rng(1).integers(0, 256, CHUNK, dtype=np.uint8)
    assert checksum(whole) != checksum(np.roll(whole, 512))
    assert checksum(np.zeros(CHUNK, dtype=np.uint8)) == 0 != checksum(np.ones(1, dtype=np.uint8))


# ---------------------------------------------------------------- copies that fail


class Faulty(FileTier):
    """A disk that misbehaves after ``good`` requests of one kind."""

    fault, good = "", 3
    gate: threading.Event | None = None
    """What a write that fails waits for."""

    def _due(self, kind):
        if not self.fault.startswith(kind):
            return False
        self.good -= 1
        return self.good < 0

    def pwrite(self, data, offset):
        if self._due("write"):
            if self.gate is not None:
                self.gate.wait()
            if "full" in self.fault:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if "short" in self.fault:
                return 0
            if "silent" in self.fault:
                return len(data)
        return super().pwrite(data, offset)

    def pread(self, data, offset):
        if self._due("read"):
            if "error" in self.fault:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            if "short" in self.fault:
                return 0
            if "flip" in self.fault:
                got = super().pread(data, offset)
                data[100] ^= 1
                return got
        return super().pread(data, offset)


FAULTS = {
    "write full": r"write of \d+ bytes at offset \d+ .* failed: .*No space left on device; free space there",
    "write short": r"short write, 0 of \d+ bytes at offset \d+",
    "write silent": r"checksum mismatch|short read",
    "read error": r"read of \d+ bytes at offset \d+ .* failed: .*Input/output error",
    "read short": r"short read, 0 of \d+ bytes at offset \d+",
    "read flip": r"checksum mismatch in \d+ bytes at offset \d+ .*: the disk returned other bytes",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_errors_of_a_copy_surface_once_and_clearly(tmp_path, fault):
    model, ids = make_zoo(), token_ids(TOKENS)
    tier = Faulty(tmp_path, name="scratch")
    with OffloadEngine([tier], min_bytes=512) as engine:
        for attempt in range(2):
            tier.fault, tier.good = fault, 3
            with pytest.raises(OffloadError, match="scratch: .*" if attempt else FAULTS[fault]):
                with engine.micro_batch(model, tokens=TOKENS):
                    model(ids).backward()
            gc.collect()
        tier.fault = ""
        engine.finish(failed=True)
        with engine.micro_batch(model, tokens=TOKENS):  # the engine goes on once the disk does
            model(ids).backward()
        engine.settle()
        assert engine.meter.device == 0 and tier.used == 0


@pytest.mark.parametrize("backward", [False, True])
def test_an_error_that_is_told_at_the_end_is_told_once(tmp_path, backward):
    """Of a forward whose last copy fails when nothing is left to notice it: what is in memory still serves backward."""
    model, ids = make_zoo(), token_ids(TOKENS)
    tier = Faulty(tmp_path)
    with OffloadEngine([tier], min_bytes=512) as engine:
        tier.fault, tier.good = "write full", 1 << 30
        with engine.micro_batch(model, tokens=TOKENS):
            model(ids).backward()
        tier.good, tier.gate = (1 << 30) - tier.good - 1, threading.Event()  # all writes but the last
        with pytest.raises(OffloadError, match="No space left"), engine.micro_batch(model, tokens=TOKENS):
            loss = model(ids)
            tier.gate.set()
            engine._copies.host_out.run(lambda: None).wait()
        tier.fault = ""
        if backward:
            loss.backward()
        del loss
        with engine.micro_batch(model, tokens=TOKENS):
            model(ids).backward()
    assert engine.meter.device == 0 and tier.used == 0


def copying() -> list[str]:
    """Threads that copy; others of the process may come and go."""
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("hdp-offload-"))


def test_what_fails_at_the_end_is_closed_all_the_same(tmp_path):
    model, ids, before = make_zoo(), token_ids(TOKENS), copying()
    tier = Faulty(tmp_path, named=True)
    engine = OffloadEngine([tier], min_bytes=512)
    with engine.micro_batch(model, tokens=TOKENS):
        loss = model(ids)
    assert len(list(tmp_path.iterdir())) == 1 and len(copying()) == len(before) + 2
    tier.fault, tier.good = "read error", 0
    with pytest.raises(OffloadError, match="Input/output error"):
        loss.backward()
    engine._note(OSError(errno.EIO, "a copy out that failed meanwhile"), next(iter(engine._known.values())))
    with pytest.raises(OffloadError, match="failed meanwhile"):
        engine.close()
    assert list(tmp_path.iterdir()) == [] and copying() == before
    with pytest.raises(OffloadError, match="is closed: make a new one"):
        engine.micro_batch(model)
    with pytest.raises(OffloadError, match="copies were ended"):
        engine._copies.host_out.run(lambda: None)


def test_requests_that_are_cut_short_are_taken_up_again(tmp_path):
    class Halting(FileTier):
        def pwrite(self, data, offset):
            return super().pwrite(data[: max(512, len(data) // 2 // 512 * 512)], offset)

        def pread(self, data, offset):
            return super().pread(data[: max(512, len(data) // 3 // 512 * 512)], offset)

    tier = Halting(tmp_path)
    source, split = torch.randint(0, 256, (50_000,), dtype=torch.uint8), Split(50_000, 1, 50_000)
    slot = tier.reserve(50_000)
    tier.write(slot, source, split)
    target = torch.zeros_like(source)
    tier.read(slot, target, split)
    assert torch.equal(source, target)
    tier.close()


def test_a_full_disk_for_real(tmp_path):
    """A child whose files may not grow beyond 64 KiB (RLIMIT_FSIZE) gets the error, and no signal."""
    code = f"""
import resource, signal, torch
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from hdp.offload import FileTier, OffloadError
from hdp.offload.split import Split
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
tier = FileTier({str(tmp_path)!r})
flat, split = torch.zeros(1 << 20, dtype=torch.uint8), Split(1 << 20, 1, 1 << 20)
try:
    tier.write(tier.reserve(1 << 20), flat, split)
except OffloadError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "disk: write of" in out.stdout or "short write" in out.stdout, out


# ---------------------------------------------------------------- streams


class FakeCuda:
    """Records what is asked of ``torch.cuda``, in order."""

    def __init__(self):
        self.log = []
        cuda = self

        class Event:
            def record(self, stream):
                cuda.log.append(("record", self, stream))

            def query(self):
                return True

            def synchronize(self):
                cuda.log.append(("host waits", self))

        class Stream:
            def wait_event(self, event):
                cuda.log.append(("stream waits", self, event))

            def synchronize(self):
                cuda.log.append(("drain", self))

        class Within:
            def __init__(self, stream):
                self.stream = stream

            def __enter__(self):
                cuda.log.append(("enter", self.stream))

            def __exit__(self, *_):
                cuda.log.append(("leave", self.stream))

        self.Event, self.Stream, self.stream = Event, Stream, Within
        self.compute = Stream()

    def current_stream(self):
        return self.compute


def test_cuda_copies_are_ordered_by_events():
    cuda = FakeCuda()
    out, back = CudaStream(cuda), CudaStream(cuda)
    copies = Copies(host_out=out, host_back=back, device_out=out, device_back=back, cuda=cuda)
    fence = copies.fence()
    written = out.run(lambda: cuda.log.append("copy out"), (fence,))
    read = back.run(lambda: cuda.log.append("copy back"), (written,))
    read.order()
    assert cuda.log == [
        ("record", fence.event, cuda.compute),
        ("stream waits", out.stream, fence.event),
        ("enter", out.stream), "copy out", ("leave", out.stream),
        ("record", written.event, out.stream),
        ("stream waits", back.stream, written.event),
        ("enter", back.stream), "copy back", ("leave", back.stream),
        ("record", read.event, back.stream),
        ("stream waits", cuda.compute, read.event),
    ]  # fmt: skip


def test_a_host_threads_cuda_copies_are_over_before_the_job_is():
    cuda = FakeCuda()
    stream = ThreadStream("test", cuda=cuda)
    fence = Copies(host_out=stream, host_back=stream, device_out=stream, device_back=stream, cuda=cuda).fence()
    stream.run(lambda: cuda.log.append("job"), (fence,)).wait()
    kinds = [entry if isinstance(entry, str) else entry[0] for entry in cuda.log]
    assert kinds == ["record", "host waits", "enter", "job", "leave", "drain"]
    stream.close()


def test_an_error_fails_every_job_that_depends_on_it():
    stream = ThreadStream("test")

    def fail():
        raise OSError("broken")

    ran = []
    first = stream.run(fail)
    second = stream.run(lambda: ran.append(1), (first,))
    third = stream.run(lambda: ran.append(2))
    third.wait()
    with pytest.raises(OSError, match="broken"):
        second.wait()
    assert ran == [2] and first.ready()
    stream.close()


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match="offload from device 'meta' is not supported"):
        Copies.for_device(torch.device("meta"))


# ---------------------------------------------------------------- bandwidth


def test_bandwidth_is_measured_with_all_ranks_copying_at_once(tmp_path):
    """Two ranks meet at every barrier and agree on the slower one's figure."""
    gate, seconds, results = threading.Barrier(2), [0.0, 0.0], {}

    def slowest(rank, mine):
        seconds[rank] = mine
        gate.wait()
        worst = max(seconds)
        gate.wait()
        return worst

    def rank_main(rank):
        tier = FileTier(tmp_path, name=f"disk{rank}")
        results[rank] = measure_bandwidth(
            tier, nbytes=4 << 20, piece=1 << 20, barrier=gate.wait, slowest=lambda s: slowest(rank, s)
        )
        assert tier.used == tier.owned == 0
        tier.close()

    threads = [threading.Thread(target=rank_main, args=(rank,), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == results[1] and 0 < results[0].least == min(results[0].out, results[0].back)


def test_bandwidth_of_a_tier_that_is_too_small_is_refused():
    with pytest.raises(OffloadError, match="no room for"):
        measure_bandwidth(HostTier(budget=1 << 20), nbytes=4 << 20, piece=1 << 20)
