"""The store of saved activations: what leaves, what comes back, and when memory may be used again.

[Note: lifetimes] A source is held until its copy out is over; a buffer of a tier is reused only after every copy from and to
it is over; a returned storage is handed to autograd only after the compute stream has been ordered behind its copy. Copies
that outlive their record (backward finished first, or failed) are kept in ``_ending`` until they are over.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hdp.offload.buffers import BufferPool
from hdp.offload.errors import OffloadError
from hdp.offload.meter import Meter
from hdp.offload.parameters import ParameterStorages, derives_from_parameter, local_of
from hdp.offload.records import Handle, Record, State
from hdp.offload.split import copy_bytes, make_split
from hdp.offload.streams import Copies, Done, without_frames
from hdp.offload.tiers import Chain, Tier

if TYPE_CHECKING:
    from hdp.offload.micro_batch import MicroBatch


NUMBERS_BYTES = 16
"""Storages up to this size hold numbers (which attention call it was, a seed), and stay as they are, uncounted."""


class ActivationStore:
    """Saved storages of one device and the tiers they go to. Thread-safe."""

    def __init__(
        self, tiers: Sequence[Tier], *, device: torch.device, min_bytes: int, copies: Copies | None = None
    ) -> None:
        """Arguments: see :class:`hdp.offload.engine.OffloadEngine`."""
        if min_bytes < 1:
            raise ValueError(f"min_bytes is {min_bytes}: give at least 1")
        self.device = device
        self.chain = Chain(tiers)
        self.meter = Meter()
        self.parameters = ParameterStorages()
        self.dropped: deque[Record] = deque()
        """Records that have lost a handle, once for each; see :meth:`settle`."""
        self.lock = threading.RLock()
        self._min_bytes = min_bytes
        self._copies = copies or Copies.for_device(device)
        self._returned = BufferPool()
        self._known: dict[int, Record] = {}
        self._leaving: list[Record] = []
        self._ending: list[tuple[Record, tuple[Done, ...]]] = []
        self._error: BaseException | None = None
        self._epoch = 0
        """Failed micro-batches so far: records of earlier epochs no longer report errors."""

    # ---------------------------------------------------------------- saving

    def save(self, tensor: Tensor, owner: MicroBatch, visit: int, ratio: float) -> Handle:
        """Stores one saved tensor; the storage leaves if it is large enough and no parameter's."""
        with self.lock:
            self.settle()
            self.raise_error()
            whole, tensor = tensor, local_of(tensor)
            if not self._is_activation(tensor) or (tensor is not whole and derives_from_parameter(whole)):
                return Handle(whole, owner, visit, None)
            record = self._find(tensor)
            if record is None:
                record = Record(tensor, visit, self._epoch, whole)
                self._known[record.key] = record
                self.meter.add(record.nbytes)
                if ratio > 0.0 and record.nbytes >= self._min_bytes:
                    self._leave(record, tensor, ratio, owner.tokens, owner.may_stay)
            return Handle(tensor, owner, visit, record, whole)

    def _is_activation(self, tensor: Tensor) -> bool:
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
        if (
            not plain
            or tensor.is_conj()
            or tensor.is_neg()
            or tensor.device.type != self.device.type
            or tensor.untyped_storage().nbytes() <= NUMBERS_BYTES
        ):
            return False
        return not self.parameters.owns(tensor)

    def _find(self, tensor: Tensor) -> Record | None:
        """The record of the tensor's storage, unless its bytes have changed since."""
        storage = tensor.untyped_storage()
        record = self._known.get(storage._cdata)
        if record is None or record.nbytes != storage.nbytes() or record.probe.changed:
            return None
        return record

    def _leave(self, record: Record, tensor: Tensor, ratio: float, tokens: int | None, may_stay: bool) -> None:
        split = make_split(tensor, ratio, tokens)
        if split.away == 0:
            return
        flat = record.flat
        assert flat is not None
        slot = self.chain.reserve(split.away)
        if slot is None:
            if may_stay:
                self.meter.stayed += split.away
                return
            raise self.chain.full(split.away)
        rest = self._room(split.rest) if split.rest else None

        def copy_out() -> None:
            slot.tier.write(slot, flat, split)
            if rest is not None:
                for at, to, size in split.rest_runs():
                    copy_bytes(rest[to : to + size], flat[at : at + size])

        record.split, record.slot, record.rest, record.state = split, slot, rest, State.LEAVING
        self.meter.add(split.rest)
        self.meter.left += split.away
        stream = self._copies.device_out if slot.tier.on_device_stream else self._copies.host_out
        record.written = stream.run(copy_out, (self._copies.fence(),))
        self._leaving.append(record)

    # ---------------------------------------------------------------- bringing back

    def fetch(self, record: Record) -> None:
        """Starts to bring a storage back; one that has not left yet stays."""
        with self.lock:
            if record.state is State.LEAVING:
                record.state = State.BACK  # the source is still here: it stays
            if record.state is not State.AWAY or record.handles == 0:
                return
            slot, split, rest, written = record.slot, record.split, record.rest, record.written
            assert slot is not None and split is not None and written is not None
            flat = self._room(record.nbytes)

            def copy_back() -> None:
                slot.tier.read(slot, flat, split)
                if rest is not None:
                    for at, to, size in split.rest_runs():
                        flat[at : at + size].copy_(rest[to : to + size])

            record.flat, record.state = flat, State.RETURNING
            self.meter.add(record.nbytes)
            self.meter.returned += split.away
            stream = self._copies.device_back if slot.tier.on_device_stream else self._copies.host_back
            # The fence: what the compute stream still does with memory that `flat` may have inherited comes first.
            record.read = stream.run(copy_back, (written, self._copies.fence()))

    def _room(self, nbytes: int) -> Tensor:
        """uint8 [nbytes] on the device. Not from malloc on a CPU: buffers that outlive a layer would tear its heap."""
        if self.device.type == "cpu":
            return self._returned.lease(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def load(self, handle: Handle, *, retain: bool) -> Tensor:
        """The saved tensor, for backward to use. ``retain``: it may be asked for again after backward has passed."""
        with self.lock:
            self.settle()
            self.raise_error()
            handle.probe.check(handle)
            record = handle.record
            if record is None:
                assert handle.alias is not None
                return handle.alias
            if record.state is State.AWAY:
                self.meter.late += 1
                self.fetch(record)
            if record.state is State.RETURNING:
                self._arrive(record, retain)
            assert record.flat is not None
            return handle.view_of(record.flat)

    def _arrive(self, record: Record, retain: bool) -> None:
        assert record.read is not None
        start = time.perf_counter()
        try:
            record.read.order()
        except BaseException as error:
            raise _as_offload_error(error) from error
        self.meter.waited_back += time.perf_counter() - start
        record.state = State.BACK
        if record.rest is not None and not retain:
            self.meter.add(-record.rest.numel())
            record.rest = None

    def send_off(self, record: Record) -> None:
        """Drops what came back but may be asked for again (retained graphs)."""
        with self.lock:
            if record.split is None or record.written is None or not record.written.ready():
                return
            if record.state is State.BACK and (record.rest is not None or record.split.rest == 0):
                record.flat, record.state = None, State.AWAY
                self.meter.add(-record.nbytes)

    # ---------------------------------------------------------------- ends

    def settle(self) -> None:
        """Takes note of copies that are over and of handles that are gone. Never blocks, never raises."""
        with self.lock:
            while self.dropped:
                record = self.dropped.popleft()
                record.handles -= 1
                if record.handles == 0:
                    self._die(record)
            self._leaving = [record for record in self._leaving if not self._left(record)]
            self._ending = [entry for entry in self._ending if not self._ended(entry)]

    def _left(self, record: Record) -> bool:
        if record.state is not State.LEAVING:
            return True
        assert record.written is not None
        if not record.written.ready():
            return False
        try:
            record.written.wait()
        except BaseException as error:
            self._note(error, record)
            return True  # the source stays: nothing else holds these bytes
        record.flat, record.state = None, State.AWAY
        self.meter.add(-record.nbytes)
        return True

    def _die(self, record: Record) -> None:
        known = self._known.get(record.key)
        if known is not None and known is record:  # a later save of changed bytes may have taken its place
            del self._known[record.key]
        self.meter.add(-record.on_device)
        record.state = State.DEAD
        entry = (record, tuple(done for done in (record.written, record.read) if done is not None))
        if not self._ended(entry):
            self._ending.append(entry)

    def _ended(self, entry: tuple[Record, tuple[Done, ...]]) -> bool:
        record, dones = entry
        if not all(done.ready() for done in dones):
            return False
        for done in dones:
            try:
                done.wait()
            except BaseException as error:
                self._note(error, record)
        if record.slot is not None:
            record.slot.tier.release(record.slot)
            record.slot = None
        record.flat = record.rest = None
        return True

    def wait_left(self, record: Record) -> None:
        """The host waits until a storage has left; raises what its copy raised."""
        if record.state is State.LEAVING:
            assert record.written is not None
            start = time.perf_counter()
            try:
                record.written.wait()
            except BaseException as error:
                self._note(error, record)
            self.meter.waited_out += time.perf_counter() - start
        self.settle()
        self.raise_error()

    def _note(self, error: BaseException, record: Record) -> None:
        """Remembers the first error, unless it is about a micro-batch that has failed already."""
        if self._error is None and record.epoch == self._epoch:
            self._error = without_frames(error)

    def raise_error(self) -> None:
        """Raises the first error of a copy, if there was one; until :meth:`finish` it is raised again at every use."""
        if self._error is not None:
            raise _as_offload_error(self._error) from self._error

    def finish(self, *, failed: bool) -> None:
        """End of a micro-batch: waits for copies of dead records and frees what the device does not need.

        ``failed``: an exception is on its way already; errors of copies are dropped in its favour.
        """
        with self.lock:
            self.settle()
            for record, dones in self._ending:
                for done in dones:
                    try:
                        done.wait()
                    except BaseException as error:
                        self._note(error, record)
            self.settle()
            self._returned.trim()
            self.parameters.forget_dead()
            first, self._error = self._error, None
            self._epoch += failed or first is not None  # told once: what it took with it reports nothing more
        if first is not None and not failed:
            raise _as_offload_error(first) from first


def _as_offload_error(error: BaseException) -> OffloadError:
    if isinstance(error, OffloadError):
        return OffloadError(*error.args)
    return OffloadError(f"a copy of saved activations failed: {error!r}")
