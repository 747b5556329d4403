"""Streams and events behind one small interface: CUDA's, and a threaded twin that runs the same logic on the CPU.

A *stream* runs jobs; a job may have to come *after* others. What a job yields is a :class:`Done`: the host can ask
whether it is over, wait for it, or order what the compute stream runs next behind it.

[Note: order] Nothing may rely on two jobs of one stream running in the order in which they were submitted. CUDA
promises that order, but tests replace the streams by ones that shuffle it, so every dependence is an explicit ``after``.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Protocol

import torch

from hdp.offload.errors import OffloadError

Job = Callable[[], None]


def without_frames(error: BaseException) -> BaseException:
    """The error without the frames it passed through, whose locals would keep tensors alive.

    An error that is remembered is held by the saved tensors it is about. Were it to hold a frame that holds the loss,
    this would be a cycle through autograd's C++ graph, which Python's collector cannot see: all would leak.
    """
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error


def same_error(error: BaseException) -> BaseException:
    """A new error of the same type and message, so that raising it leaves the remembered one without frames."""
    try:
        return type(error)(*error.args)
    except TypeError:
        return RuntimeError(repr(error))


class Done(Protocol):
    """The end of one job."""

    def ready(self) -> bool:
        """Whether the job is over, successfully or not."""

    def wait(self) -> None:
        """The host waits; raises what the job raised."""

    def order(self) -> None:
        """What the compute stream runs from now on comes after the job; raises what the job raised, if known."""


class Stream(Protocol):
    def run(self, job: Job, after: Sequence[Done] = ()) -> Done:
        """Runs ``job`` once all of ``after`` are over. An error of ``after`` fails this job with the same error."""

    def close(self) -> None:
        """Ends the stream; jobs already submitted are finished first."""


class Finished:
    """A job that is over: what a CPU's compute "stream" has always reached."""

    def ready(self) -> bool:
        return True

    def wait(self) -> None:
        return None

    order = wait


class ThreadDone:
    """End of a job that a thread runs."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._error: BaseException | None = None

    def finish(self, error: BaseException | None) -> None:
        self._error = None if error is None else without_frames(error)
        self._event.set()

    def ready(self) -> bool:
        return self._event.is_set()

    def wait(self) -> None:
        self._event.wait()
        if self._error is not None:
            raise same_error(self._error) from self._error

    order = wait


class ThreadStream:
    """Jobs run in a thread of their own, first come, first served. They must release the GIL where they take long."""

    def __init__(
        self, name: str, *, workers: int = 1, delay: Callable[[], float] | None = None, cuda: ModuleType | Any = None
    ) -> None:
        """
        Args:
            name: of the threads.
            workers: threads; with more than one, jobs overtake one another.
            delay: seconds to sleep before each job (tests).
            cuda: ``torch.cuda`` for jobs that copy from or to a GPU: they get a CUDA stream of their own, and are over
                when it has reached their end.
        """
        self._cuda = cuda
        self._queue: queue.SimpleQueue[tuple[Job, Sequence[Done], ThreadDone] | None] = queue.SimpleQueue()
        self._delay = delay
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"hdp-offload-{name}-{i}", daemon=True) for i in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def run(self, job: Job, after: Sequence[Done] = ()) -> ThreadDone:
        if self._closed:  # nobody would ever run it, and whoever waits for it would hang
            raise OffloadError("these copies were ended: close the engine of saved activations after the last backward")
        done = ThreadDone()
        self._queue.put((job, tuple(after), done))
        return done

    def _work(self) -> None:
        while (entry := self._queue.get()) is not None:
            job, after, done = entry
            error: BaseException | None = None
            try:
                for earlier in after:
                    earlier.wait()
                if self._delay is not None:
                    time.sleep(self._delay())
                self._perform(job)
            except BaseException as caught:  # handed to whoever waits for the job
                error = caught
            # The job's closure holds tensors: they must be gone before the waiter goes on and counts memory.
            entry = job = after = None  # type: ignore[assignment]
            done.finish(error)
            done = None  # type: ignore[assignment]

    def _perform(self, job: Job) -> None:
        if self._cuda is None:
            job()
            return
        stream = self._cuda.Stream()
        with self._cuda.stream(stream):
            job()
        stream.synchronize()

    def close(self) -> None:
        self._closed = True
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()


class CudaDone:
    """An event recorded on a CUDA stream."""

    def __init__(self, cuda: ModuleType | Any, stream: Any) -> None:
        self._cuda = cuda
        self.event = cuda.Event()
        self.event.record(stream)

    def ready(self) -> bool:
        return bool(self.event.query())

    def wait(self) -> None:
        self.event.synchronize()

    def order(self) -> None:
        self._cuda.current_stream().wait_event(self.event)


class CudaStream:
    """Jobs are enqueued at once on a stream of their own; the host goes on."""

    def __init__(self, cuda: ModuleType | Any = torch.cuda) -> None:
        self._cuda = cuda
        self.stream = cuda.Stream()

    def run(self, job: Job, after: Sequence[Done] = ()) -> CudaDone:
        for earlier in after:
            if isinstance(earlier, CudaDone):
                self.stream.wait_event(earlier.event)
            else:
                earlier.wait()
        with self._cuda.stream(self.stream):
            job()
        return CudaDone(self._cuda, self.stream)

    def close(self) -> None:
        self.stream.synchronize()


class Copies:
    """The copy streams of one device: out and back apart, so that both directions of a link are in use.

    Tiers whose copies a device enqueues (pinned memory) use ``device_out`` and ``device_back``; tiers that need a host
    thread (files) use ``host_out`` and ``host_back``. On a CPU the two pairs are the same threads.
    """

    def __init__(
        self, *, host_out: Stream, host_back: Stream, device_out: Stream, device_back: Stream, cuda: Any = None
    ) -> None:
        self.host_out, self.host_back = host_out, host_back
        self.device_out, self.device_back = device_out, device_back
        self._cuda = cuda

    @classmethod
    def for_device(cls, device: torch.device) -> Copies:
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"offload from device {str(device)!r} is not supported: use a cpu or cuda device")
        cuda = torch.cuda if device.type == "cuda" else None
        out, back = ThreadStream("out", cuda=cuda), ThreadStream("back", cuda=cuda)
        if device.type == "cpu":
            return cls(host_out=out, host_back=back, device_out=out, device_back=back)
        return cls(host_out=out, host_back=back, device_out=CudaStream(), device_back=CudaStream(), cuda=cuda)

    def fence(self) -> Done:
        """Over when all that the compute stream has been given so far is over."""
        return Finished() if self._cuda is None else CudaDone(self._cuda, self._cuda.current_stream())

    def close(self) -> None:
        for stream in {id(s): s for s in (self.device_out, self.device_back, self.host_out, self.host_back)}.values():
            stream.close()
