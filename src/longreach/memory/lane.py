"""A lane: copies that run beside what is computed, one after the other. A thread, and on CUDA a stream of its own. Knows tensors, not what they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch


@dataclass(eq=False)
class Reading:
    """Copies that are under way. Nobody may look at what they write to before they are `done`."""

    future: Future[list[torch.cuda.Event]]

    def done(self) -> None:
        """Wait; raises what the copies have raised."""
        for event in self.future.result():
            event.wait()  # on the stream that computes


    def end(self) -> None:
        """Nobody wants it any more; when this returns nothing is copied."""
        if not self.future.cancel():
            self.future.exception()


class Lane:
    def __init__(self) -> None:
        self._threads: ThreadPoolExecutor | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def begin(self, copy: Callable[[], object], out: Sequence[torch.Tensor]) -> Reading:
        """Run `copy`, which writes to `out`, after what was computed so far on their devices."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(1, "longreach-blocks")
        devices = sorted({tensor.device for tensor in out if tensor.is_cuda}, key=str)
        before = [torch.cuda.current_stream(device).record_event() for device in devices]
        for device in devices:
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)
        streams = [self._streams[device] for device in devices]
        for tensor in out:
            if tensor.is_cuda:
                tensor.record_stream(self._streams[tensor.device])  # its memory is not given away before the copies are done
        return Reading(self._threads.submit(_run, copy, streams, before))

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
            self._threads = None


def _run(copy: Callable[[], object], streams: Sequence[torch.cuda.Stream], before: Sequence[torch.cuda.Event]) -> list[torch.cuda.Event]:
    if not streams:
        copy()
        return []
    (stream,), (event,) = streams, before  # a layer lies on one device
    with torch.cuda.stream(stream):
        stream.wait_event(event)
        copy()
        return [stream.record_event()]
