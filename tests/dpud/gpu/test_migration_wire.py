# SPDX-License-Identifier: GPL-2.0-only
"""The destination believes nothing: whatever comes over the connection, nothing is half installed."""

import errno
from typing import Any

import msgspec
import numpy as np
import pytest
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from migrating import World
from small import KIB

from dpud.gpu.migration.channel import Channel, Pipe, parse_address
from dpud.gpu.migration.converge import Strategy
from dpud.gpu.migration.encoding import PageEncoder, decode_pages, new_codec
from dpud.gpu.migration.pages import Area, Manifest
from dpud.gpu.migration.remote_target import Hello, missing_payloads, put_missing
from dpud.gpu.migration.state import NEXT, OVER, State
from dpud.gpu.migration.wire import HEADER_BYTES, MAX_PAYLOAD_BYTES, FrameReader, FrameWriter, Kind, ProtocolError


def recorded(strategy: Strategy = Strategy.PRECOPY) -> list[bytes]:
    """The frames of a migration that went well, as its source sent them."""
    world = World()
    world.fill("c", 40 * KIB)
    world.a.migration.settings.strategy = strategy
    sent: list[bytes] = []

    def new_pipes() -> tuple[Channel, Channel]:
        ours, theirs = Pipe.pair()
        plain = ours.send_bytes

        def send_bytes(data: bytes) -> None:
            sent.append(data)
            plain(data)

        ours.send_bytes = send_bytes  # type: ignore[method-assign]
        return ours, theirs

    world.new_pipes = new_pipes
    world.run(world.start())
    assert world.b.has("c")
    return sent


FRAMES = recorded()
POSTCOPY_FRAMES = recorded(Strategy.HYBRID)


class Fed:
    """A destination that is told bytes by nobody who understands them."""

    def __init__(self) -> None:
        self.world = World()
        self.side = self.world.b
        self.pipe, theirs = Pipe.pair()
        self.serving = self.side.migration.receiver.serve(theirs)
        self.ended = False
        self.step()

    def step(self) -> None:
        for _ in range(200):
            if self.ended or next(self.serving, StopIteration) is StopIteration:
                self.ended = True
                return

    def feed(self, data: bytes) -> None:
        if not self.ended:
            self.pipe.send_bytes(data)
            self.step()

    def hang_up(self) -> None:
        self.pipe.close()
        self.step()
        assert self.ended

    def check(self, *, owns: bool) -> None:
        """Everything, or nothing."""
        self.side.check()
        memory, sessions = self.side.memory, self.side.migration.receiver.sessions
        if owns:
            assert self.side.has("c")
        elif not sessions:
            assert memory.clients == {}
            for location in memory.locations:
                assert location.frames.nr_free == location.frames.nr_frames
        else:  # prepared, and in doubt: kept, and not to be used
            assert all(region.held for region in memory.clients["c"].regions)


def kinds(frames: list[bytes]) -> list[Kind]:
    return [Kind(int.from_bytes(frame[6:8], "little")) for frame in frames]


def test_the_recorded_frames_are_what_makes_an_owner() -> None:
    assert kinds(FRAMES)[0] is Kind.HELLO
    assert kinds(FRAMES)[-2:] == [Kind.FINAL, Kind.COMMIT]
    fed = Fed()
    for frame in FRAMES:
        fed.check(owns=False) if frame is FRAMES[0] else None
        fed.feed(frame)
    fed.check(owns=True)


@pytest.mark.slow
@given(st.lists(st.binary(max_size=200), max_size=8))
def test_garbage(pieces: list[bytes]) -> None:
    fed = Fed()
    for piece in pieces:
        fed.feed(piece)
    fed.hang_up()
    fed.check(owns=False)


@pytest.mark.slow
@given(st.data())
@settings(max_examples=examples(60))
def test_flipped_bits(data: Any) -> None:
    frames = [bytearray(frame) for frame in FRAMES]
    frame = frames[data.draw(st.integers(0, len(frames) - 1))]
    frame[data.draw(st.integers(0, len(frame) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    fed = Fed()
    for each in frames:
        fed.feed(bytes(each))
    fed.hang_up()
    fed.check(owns=False)


@pytest.mark.slow
@given(st.data())
@settings(max_examples=examples(60))
def test_truncation(data: Any) -> None:
    stream = b"".join(FRAMES)
    fed = Fed()
    fed.feed(stream[: data.draw(st.integers(0, len(stream) - 1))])
    fed.hang_up()
    fed.check(owns=False)


@pytest.mark.slow
@given(st.data())
@settings(max_examples=examples(60))
def test_frames_left_out_repeated_or_in_another_order(data: Any) -> None:
    """With numbers and checks as they have to be: what is wrong is what they say."""
    order = data.draw(st.lists(st.integers(0, len(FRAMES) - 1), max_size=len(FRAMES) + 3))
    writer, fed = FrameWriter(), Fed()
    for index in order:
        fed.feed(writer.frame(kinds(FRAMES)[index], FRAMES[index][HEADER_BYTES:]))
    before = order[: order.index(len(FRAMES) - 1)] if len(FRAMES) - 1 in order else order
    complete = [index for index in before if kinds(FRAMES)[index] is not Kind.PAGES]
    everything = [index for index in range(len(FRAMES) - 1) if kinds(FRAMES)[index] is not Kind.PAGES]
    fed.hang_up()
    fed.check(owns=fed.side.has("c"))
    if fed.side.has("c"):  # then it had all there is, in an order that makes sense
        assert complete == everything


@pytest.mark.slow
@given(st.data())
@settings(max_examples=examples(60))
def test_any_payload_in_a_good_frame(data: Any) -> None:
    """Lies that are well formed: every kind of frame, with payloads changed anywhere, in post-copy too."""
    frames = data.draw(st.sampled_from([FRAMES, POSTCOPY_FRAMES]))
    at = data.draw(st.integers(0, len(frames) - 1))
    kind = data.draw(st.sampled_from([kinds(frames)[at], *Kind]))
    payload = bytearray(frames[at][HEADER_BYTES:])
    for _ in range(data.draw(st.integers(0, 3))):
        if payload:
            payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    payload = payload[: data.draw(st.integers(0, len(payload)))] if data.draw(st.booleans()) else payload
    writer, fed = FrameWriter(), Fed()
    for index, frame in enumerate(frames):
        lie = index == at
        fed.feed(writer.frame(kind if lie else kinds(frames)[index], bytes(payload) if lie else frame[HEADER_BYTES:]))
    fed.hang_up()
    fed.side.check()


def test_replays_are_refused() -> None:
    fed = Fed()
    fed.feed(FRAMES[0])
    fed.feed(FRAMES[0])
    assert fed.ended
    assert fed.side.migration.receiver.nr_refused == 1
    fed.check(owns=False)
    again = Fed()
    for frame in FRAMES:
        again.feed(frame)
    pipe, theirs = Pipe.pair()
    serving = again.side.migration.receiver.serve(theirs)
    for frame in FRAMES:
        pipe.send_bytes(frame) if not theirs.is_cut else None
        for _ in range(50):
            if next(serving, StopIteration) is StopIteration:
                break
    assert again.side.migration.receiver.nr_refused == 1
    again.check(owns=True)


def test_an_oversized_frame_is_refused_before_it_is_there() -> None:
    reader = FrameReader()
    frame = bytearray(FrameWriter().frame(Kind.PAGES, b"x"))
    frame[12:16] = (MAX_PAYLOAD_BYTES + 1).to_bytes(4, "little")
    reader.feed(bytes(frame))
    with pytest.raises(ProtocolError, match="a frame of"):
        reader.next()
    with pytest.raises(ProtocolError):
        reader.next()
    assert reader.nr_wanted <= HEADER_BYTES


@pytest.mark.slow
@pytest.mark.parametrize(
    "manifest",
    [
        {"client": "../x", "areas": [{"nr_bytes": 1, "page_bytes": 4096}]},
        {"client": "c", "areas": [{"nr_bytes": 0, "page_bytes": 4096}]},
        {"client": "c", "areas": [{"nr_bytes": 1, "page_bytes": 4095}]},
        {"client": "c", "areas": [{"nr_bytes": 1 << 41, "page_bytes": 4096}]},
        {"client": "c", "areas": [{"nr_bytes": 1 << 40, "page_bytes": 2048}]},
        {"client": "c", "areas": [{"nr_bytes": 1, "page_bytes": 4096, "name": "a/b"}]},
        {"client": "c", "areas": [{"nr_bytes": 1, "page_bytes": 4096, "name": "a"}] * 2},
        {"client": "c", "areas": [{"nr_bytes": 1, "page_bytes": 4096, "permissions": [[0, 2, 4]]}]},
        {"client": "c", "areas": [{"nr_bytes": 1, "page_bytes": 4096, "permissions": [[0, 1, 8]]}]},
        {"client": "c", "areas": [{"nr_bytes": 1, "page_bytes": 4096, "extra": 1}]},
        {"client": "c", "areas": []},
        {"client": "c"},
        None,
        [],
    ],
)
def test_manifests_that_make_no_sense(manifest: Any) -> None:
    fed = Fed()
    fed.feed(FrameWriter().frame(Kind.HELLO, msgspec.json.encode({"id": "i", "intent": "new", "manifest": manifest})))
    assert fed.ended
    assert fed.side.migration.receiver.nr_refused == 1
    fed.check(owns=False)


@pytest.mark.slow
def test_a_page_of_nonsense_is_a_protocol_error_not_a_crash() -> None:
    areas = [Area(40 * KIB, 4096)]
    rng = np.random.default_rng(2)
    rows = rng.integers(0, 255, (4, 4096), dtype=np.uint8)
    rows[1] = 0
    rows[2] = 7
    lost = np.array([False, False, False, True])
    current = _Zeros()
    for codec in ("none", "lz4", "zstd", "snappy", "adaptive"):
        payload = PageEncoder(new_codec(codec)).encode(0, np.array([1, 3, 4, 9]), rows, lost)
        area, pages, decoded, gone = decode_pages(payload, areas, current)
        assert (area, pages.tolist(), gone.tolist()) == (0, [1, 3, 4, 9], lost.tolist())
        assert np.array_equal(decoded[~lost], rows[~lost])
        for _ in range(300):
            broken = bytearray(payload)
            broken[int(rng.integers(0, len(broken)))] ^= int(rng.integers(1, 256))
            with pytest.raises(ProtocolError):
                _refuse_or_same(bytes(broken), areas, current, rows, lost)


def _refuse_or_same(payload: bytes, areas: list[Area], current: "_Zeros", rows: Any, lost: Any) -> None:
    """Whatever one changed byte does to what has no check of its own, it is never other bytes for a page."""
    _, pages, decoded, gone = decode_pages(payload, areas, current)
    for page, row, is_gone in zip(pages.tolist(), decoded, gone.tolist(), strict=True):
        assert is_gone or any(np.array_equal(row, known) for known in (*rows[~lost], np.zeros(4096, np.uint8))), page
    raise ProtocolError("another page, or another fate, which the frame's check would have shown")


class _Zeros:
    def read(self, area: int, pages: Any) -> tuple[Any, Any]:
        return np.zeros((len(pages), 4096), np.uint8), np.zeros(len(pages), np.bool_)


@given(st.lists(st.integers(1, 70_000), min_size=1, max_size=3), st.integers(0, 2**32))
@settings(max_examples=examples(20))
def test_masks_of_missing_pages_come_over(sizes: list[int], seed: int) -> None:
    areas = [Area(nr * 4096, 4096) for nr in sizes]
    rng = np.random.default_rng(seed)
    masks = [rng.random(nr) < 0.3 for nr in sizes]
    found = [np.zeros(nr, np.bool_) for nr in sizes]
    for payload in missing_payloads(masks):
        put_missing(payload, areas, found)
    assert all(np.array_equal(mask, other) for mask, other in zip(masks, found, strict=True))


def test_a_hello_is_small_and_plain() -> None:
    hello = Hello("i", "new", Manifest("c", [Area(4096, 4096)]))
    assert msgspec.json.decode(msgspec.json.encode(hello), type=Hello) == hello


def test_every_state_is_qemu_s_and_leads_somewhere() -> None:
    known = "none setup active device postcopy-active postcopy-paused postcopy-recover completed failing failed"
    assert {str(state) for state in State} == {*known.split(), "cancelling", "cancelled"}
    reached = {State.NONE}
    for _ in State:
        reached |= {after for state in reached for after in NEXT[state]}
    assert reached == set(State)
    assert {State.COMPLETED, State.FAILED, State.CANCELLED} == OVER


def test_addresses() -> None:
    assert parse_address("unix:/run/x")[1] == "/run/x"
    assert parse_address("tcp:10.0.0.1:4444")[1] == ("10.0.0.1", 4444)
    for text in ("", "unix:", "unix:x", "tcp:1", "tcp::1", "tcp:h:x", "udp:h:1"):
        with pytest.raises(OSError, match=str(errno.EINVAL)):
            parse_address(text)


@pytest.mark.slow
def test_memory_for_what_is_promised_is_bounded_by_what_there_is() -> None:
    """A manifest of many large areas: refused for want of room, or taken; never more than there is."""
    areas = [{"nr_bytes": 1 << 30, "page_bytes": 2 << 20, "name": f"n{number}"} for number in range(2000)]
    fed = Fed()
    hello = {"id": "i", "intent": "new", "manifest": {"client": "c", "areas": areas}}
    fed.feed(FrameWriter().frame(Kind.HELLO, msgspec.json.encode(hello)))
    fed.hang_up()
    fed.check(owns=False)
