"""What travels from rank 0 to the others over a socket pair: commands as JSON, steps as numbers.

A token that is still PENDING goes as PENDING less its row in the flight. Each step is told all of its own tokens, so
nobody beside rank 0 ever needs what became of one.
"""

import json
import socket
import struct
from array import array
from collections.abc import Sequence
from typing import Any

from fewbit.engine.batch import Flight
from fewbit.engine.params import SamplingParams
from fewbit.engine.request import PENDING, Request, Stream
from fewbit.engine.scheduler import Work

HEAD = struct.Struct("<cQ")
COMMAND, STEP = b"c", b"s"
LARGEST = 1 << 30  # bytes of a message


class Wire:
    """One end of a socket pair: framed messages, each a kind and bytes."""

    def __init__(self, end: socket.socket):
        self.end = end

    def send(self, kind: bytes, data: bytes) -> None:
        self.end.sendall(HEAD.pack(kind, len(data)) + data)

    def tell(self, **values: Any) -> None:
        self.send(COMMAND, json.dumps(values).encode())

    def receive(self) -> tuple[bytes, bytes]:
        """The next message; EOFError when the other end is gone."""
        kind, size = HEAD.unpack(self._read(HEAD.size))
        if size > LARGEST:
            raise EOFError(f"a message of {size} bytes")
        return kind, self._read(size)

    def _read(self, size: int) -> bytes:
        data = bytearray(size)
        view, at = memoryview(data), 0
        while at < size:
            got = self.end.recv_into(view[at:])
            if not got:
                raise EOFError("the other end is closed")
            at += got
        return bytes(data)

    def close(self) -> None:
        self.end.close()


class Sender:
    """Works -> numbers. A stream's pages are sent once, as they are added."""

    def __init__(self) -> None:
        self._known: dict[Stream, tuple[int, list[int]]] = {}  # with its number and the pages the others know of
        self._next = 0

    def pack(self, works: Sequence[Work], flight: Flight | None = None) -> bytes:
        """flight: of a step some of whose tokens are pending."""
        now = {work.stream for work in works}
        gone = [stream for stream in self._known if stream not in now and not stream.pages]
        out = array("q", [len(gone), *(self._known.pop(stream)[0] for stream in gone)])
        out.extend([0 if flight is None else len(flight.tokens), len(works)])
        for work in works:
            self._work(work, out, flight)
        return out.tobytes()

    def _work(self, work: Work, out: "array[int]", flight: Flight | None) -> None:
        stream = work.stream
        if stream not in self._known:
            self._known[stream] = self._next, []
            self._next += 1
        number, sent = self._known[stream]
        keep = len(sent) if stream.pages[: len(sent)] == sent else 0
        new, tokens = stream.pages[keep:], stream.tokens[work.start : work.stop]
        if work.pending:
            assert flight is not None
            tokens[-1] = PENDING - flight.rows[stream]
        every = stream.request.params.prompt_logprobs is not None
        flags = work.samples | every << 1 | (stream.state is None) << 2
        out.extend([number, work.start, flags, stream.prompt_length, len(tokens), keep, len(new)])
        out.extend(tokens)
        out.extend(new)
        self._known[stream] = number, list(stream.pages)


class Receiver:
    """Numbers -> works over streams that say to a runner what rank 0's say."""

    def __init__(self) -> None:
        self._known: dict[int, Stream] = {}

    def unpack(self, data: bytes) -> tuple[list[Work], int, dict[Stream, int]]:
        """-> works; how many tokens are in flight, where one of them is needed, else 0; in which row whose is"""
        numbers = array("q")
        numbers.frombytes(data)
        held = numbers.tolist()
        gone = held[1 : 1 + held[0]]
        for number in gone:
            self._known.pop(number).pages = []  # as rank 0's have none: Tables gives its row to another
        at = 3 + len(gone)
        count, left = held[at - 2 : at]
        works: list[Work] = []
        rows: dict[Stream, int] = {}
        for _ in range(left):
            work, at = self._work(held, at, rows)
            works.append(work)
        return works, count, rows

    def _work(self, held: list[int], at: int, rows: dict[Stream, int]) -> tuple[Work, int]:
        number, start, flags, prompt, count, keep, new = held[at : at + 7]
        tokens = held[at + 7 : at + 7 + count]
        end = at + 7 + count + new
        if number not in self._known:
            params = SamplingParams(prompt_logprobs=0 if flags & 2 else None)
            self._known[number] = Stream(Request(str(number), [0] * prompt, params), 0, 0, [])
        stream = self._known[number]
        added = held[end - new : end]
        if keep == len(stream.pages):
            stream.pages += added
        else:  # begun again: a list of its own, by which Tables knows
            stream.pages = stream.pages[:keep] + added
        stream.state = None if flags & 4 else stream.state
        if tokens[-1] <= PENDING:
            rows[stream] = PENDING - tokens[-1]
            tokens[-1] = PENDING
        stream.tokens += [0] * (start - len(stream.tokens))
        stream.tokens[start:] = tokens if flags & 1 else [*tokens, 0]  # one more, where no token follows
        return Work(stream, start, start + count), end
