# SPDX-License-Identifier: MIT
"""/sys/kernel/config/gpu_memvirt/gpuN/clients: programs that use GPU memory, made with mkdir, driven with echo and dd.

mkdir clients/train                          a client of this device
mkdir clients/train/buffers/weights          a buffer of it, without memory yet
echo managed > .../weights/type              before the size: what kind of memory
echo 64M > .../weights/size                  allocates; 0 frees
dd if=file of=.../weights/data bs=1M         writes its bytes, through permission, translation, faults
echo 16M > .../weights/reclaim               evicts that much of it
cat .../weights/state                        where its pages are
sha256sum .../weights/data                   reads them back, from wherever they are
echo 'infer r--' > .../weights/grant         another client may read it
rmdir .../weights                            frees it
"""

import errno
from collections.abc import Mapping

import numpy as np

from dpud.gpu.address_space.advice import Advice
from dpud.gpu.address_space.pagetable import PTE_PRESENT
from dpud.gpu.address_space.permissions import READ_WRITE, Permission, Permissions, parse_permissions
from dpud.gpu.address_space.regions import PageState, Region, RegionType
from dpud.gpu.errors import GpuError
from dpud.gpu.files import check_name, settle
from dpud.gpu.memory import HOST, GpuMemory
from dpud.gpu.overcommit import Admission as Overcommit
from dpud.gpu.overcommit.files import ClientPromises
from dpud.gpu.qos.files import ClientBandwidth
from dpud.gpu.qos.module import QosModule
from kernelsim.attr import (
    Attr,
    Bytes,
    Choice,
    ConfigGroup,
    Dir,
    Int,
    Kobject,
    Operation,
    Registry,
    Size,
    Text,
    Trigger,
)
from kernelsim.kinds import consumed

_PIECE_BYTES, _RESIDENT_PIECE_BYTES = 128 << 10, 512 << 10
"""How much of one read or write is done before others may use the machine: more where all pages are in some memory."""

_PAGE_BYTES = {"2K": 2 << 10, "4K": 4 << 10, "64K": 64 << 10, "2M": 2 << 20}

MAX_BUFFER_BYTES = 1 << 38


class Buffer(Kobject):
    """One buffer of a client."""

    apart = True

    type = Attr(Choice(*(kind.value for kind in RegionType)), "device", doc="Kind of memory; EBUSY once allocated.")
    page_size = Attr(Choice(*_PAGE_BYTES), "4K", doc="Size of its pages; EBUSY once allocated.")
    priority = Attr(Int(0, 100), 0, doc="For admission, larger is more important; EBUSY once allocated.")
    size = Attr(Size(0, MAX_BUFFER_BYTES), doc="Bytes; writing allocates, 0 frees. EBUSY while there are some.")
    permissions = Attr(Permissions(), READ_WRITE, doc="What the client itself may do with it.")
    va = Attr(Text(), doc="Its address; empty without memory.")
    data = Attr(
        consumed(Bytes()),
        mode=0o600,
        doc="Its bytes, at offsets. EACCES where permissions say so, EIO for lost ones.",
    )
    state = Attr(Text(), doc="Its pages: by state, by location, dirty, accessed; name and count.")
    location = Attr(
        Text(), doc="Where data is accessed from: deviceN or host; the client's device at first.", mode=0o644
    )
    advice = Attr(Text(), doc="How managed memory will be used, such as `read-mostly` or `preferred-location host`.")
    grant = Attr(Text(), doc="Other clients and their permissions, one a line; write `NAME rwx`.", mode=0o644)
    reclaim = Attr(Size(1), doc="Evict this much of it. EAGAIN where less could go.")
    prefetch = Attr(Text(), doc="Bring managed memory to a location: deviceN or host.")
    sync = Attr(Trigger(), doc="Have pool or swap hold a copy of every page that they have none of.")
    clear_refs = Attr(Trigger(), doc="Count accessed pages anew.")

    def __init__(self, memory: GpuMemory, client: str, name: str = "") -> None:
        self.memory = memory
        self.client = client
        self.name = name
        self._region: Region | None = None
        self._at: int | None = None

    @property
    def region(self) -> Region | None:
        """Its memory, unless that is gone or went elsewhere."""
        return None if self._region is None or self._region.released else self._region

    @region.setter
    def region(self, region: Region | None) -> None:
        self._region = region
        if region is not None:
            region.name = self.name

    # Allocation.

    @type.stored
    def _type_changed(self, _old: str, _new: str) -> None:
        self._check_unallocated()

    @page_size.stored
    def _page_size_changed(self, _old: str, _new: str) -> None:
        self._check_unallocated()

    @priority.stored
    def _priority_changed(self, _old: int, _new: int) -> None:
        self._check_unallocated()

    def _check_unallocated(self) -> None:
        if self.region is not None:
            raise OSError(errno.EBUSY, "it has memory already")

    @size.show
    def _show_size(self) -> int:
        return 0 if self.region is None else self.region.nr_bytes

    @size.store
    def _set_size(self, nr_bytes: int) -> Operation[None]:
        if nr_bytes == 0:
            self.release()
            return
        self._check_unallocated()
        va = yield from self.memory.allocation(
            self.client,
            nr_bytes,
            RegionType(self.type),
            self.permissions,
            page_size=_PAGE_BYTES[self.page_size],
            priority=self.priority,
            device=None,
            timeout_ns=self._timeout_ns(),
        )
        if self.region is not None:  # somebody else was faster while admission let us wait
            self.memory.free(va, self.client)
            raise OSError(errno.EBUSY, "it has memory already")
        self.region = self.memory.space.regions.find(va)

    def _timeout_ns(self) -> int:
        """How long its client lets it wait for memory."""
        admission = self.memory.accounting.admission
        return admission.account(self.client).timeout_ns if isinstance(admission, Overcommit) else 0

    def adopt(self, region: Region) -> None:
        """Memory that was not allocated here; its attributes are the buffer's from now on."""
        self.region = region
        granted = region.permissions[self.client]
        self.type, self.priority = region.type.value, region.priority
        self.page_size = next(text for text, size in _PAGE_BYTES.items() if size == region.page_bytes)
        self.permissions = Permission(int(granted[0]))

    def release(self) -> None:
        """Free the memory, if there is any."""
        if self.region is not None:
            self.memory.free(self.region.va, self.client)
            self.region = None

    def _allocated(self) -> Region:
        if self.region is None:
            raise OSError(errno.ENODATA, "it has no memory")
        return self.region

    @va.show
    def _show_va(self) -> str:
        return "" if self.region is None else f"{self.region.va:#x}"

    # Bytes.

    @data.size
    def _data_size(self) -> int:
        return self._show_size()

    @data.read
    def _read_data(self, pos: int, size: int, _nonblock: bool) -> Operation[bytes]:
        if self.region is None or pos >= self.region.nr_bytes:
            return b""
        pieces = []
        end = min(pos + size, self.region.nr_bytes)
        while pos < end:
            nr = self._piece_bytes(pos, end)
            yield from self.memory.residency.traffic.admission(self.client, nr)
            region = self._allocated()
            if self.memory.migration is not None:
                yield from self.memory.migration.pass_gate(region, pos, nr, False)
            pieces.append(self.memory.read(self.client, region.va + pos, nr, self._at))
            pos += nr
            yield from settle(self.memory)
            if pos < end:
                yield None
        return b"".join(pieces)

    def _piece_bytes(self, pos: int, end: int) -> int:
        """Of an access to [pos, end) what is to be done at once; it depends on nothing but the state."""
        region = self._allocated()
        nr = min(_RESIDENT_PIECE_BYTES, end - pos)
        first, last = pos >> region.page_shift, (pos + nr - 1) >> region.page_shift
        is_resident = bool((region.state[first : last + 1] == PageState.RESIDENT).all())
        return nr if is_resident else min(_PIECE_BYTES, nr)

    @data.write_at
    def _write_data(self, pos: int, data: bytes) -> Operation[int]:
        if self.region is None or pos >= self.region.nr_bytes:
            raise OSError(errno.ENOSPC, "beyond the buffer's end")
        view = memoryview(data)[: self.region.nr_bytes - pos]
        done = 0
        while done < len(view):
            piece = view[done : done + self._piece_bytes(pos + done, pos + len(view))]
            yield from self.memory.residency.traffic.admission(self.client, len(piece))
            if self.memory.migration is not None:
                yield from self.memory.migration.pass_gate(self._allocated(), pos + done, len(piece), True)
            try:
                self.memory.write(self.client, self._allocated().va + pos + done, piece, self._at)
            except GpuError as error:
                if done + error.nr_done == 0:
                    raise
                return done + error.nr_done
            done += len(piece)
            yield from settle(self.memory)
            if done < len(view):
                yield None
        return done

    # Pages.

    @state.show
    def _show_state(self) -> str:
        region = self.region
        if region is None:
            return ""
        counts = {"pages": region.nr_pages} | self.memory.state_of(region)
        counts["dirty"] = int(np.count_nonzero((region.state == PageState.RESIDENT) & ~region.backed))
        entries = self.memory.space.table.ptes[:, region.leaf : region.leaf + region.nr_pages]
        counts["accessed"] = int(np.count_nonzero(self.memory.space.accessed(region)))
        counts["mapped"] = int(np.count_nonzero((entries & PTE_PRESENT).any(axis=0)))
        counts["copies"] = sum(map(len, region.replicas.values()))
        return "".join(f"{name} {nr}\n" for name, nr in counts.items())

    @clear_refs.store
    def _clear_refs(self, _text: str) -> None:
        region = self._allocated()
        self.memory.space.clear_accessed(region)

    @reclaim.store
    def _reclaim(self, nr_bytes: int) -> Operation[None]:
        region = self._allocated()
        wanted = -(-nr_bytes >> region.page_shift)
        resident = np.flatnonzero(region.state == PageState.RESIDENT)[:wanted]
        nr = 0
        for pages in np.array_split(resident, max(1, len(resident) * region.page_bytes // _PIECE_BYTES)):
            nr += self.memory.residency.evict_pages(region, pages)
            yield from settle(self.memory)
        if nr < wanted:
            raise OSError(errno.EAGAIN, f"{nr} of {wanted} pages could be evicted")

    @sync.store
    def _sync(self, _text: str) -> Operation[None]:
        region = self._allocated()
        for pages in np.array_split(np.arange(region.nr_pages), -(-region.nr_bytes // _PIECE_BYTES)):
            self.memory.faults.write_back(region, pages)
            yield from settle(self.memory)

    @prefetch.store
    def _prefetch(self, text: str) -> Operation[None]:
        region = self._allocated()
        self.memory.prefetch(self.client, region.va, region.nr_bytes, self._parse_location(text))
        yield from settle(self.memory)

    # Who, and how.

    @permissions.stored
    def _protect(self, _old: Permission, new: Permission) -> None:
        if self.region is not None:
            self.memory.protect(self.client, self.region.va, self.region.nr_bytes, new)

    @grant.show
    def _show_grants(self) -> str:
        if self.region is None:
            return ""
        others = {name: bits for name, bits in self.region.permissions.items() if name != self.client}
        return "".join(f"{name} {Permission(int(bits[0]))}\n" for name, bits in sorted(others.items()))

    @grant.store
    def _grant(self, text: str) -> None:
        region = self._allocated()
        name, _, letters = text.strip().partition(" ")
        if name not in self.memory.clients or name == self.client:
            raise OSError(errno.EINVAL, f"no other client {name!r}")
        granted = parse_permissions(letters.strip())
        self.memory.protect(self.client, region.va, region.nr_bytes, granted, of=name)

    @location.show
    def _show_location(self) -> str:
        at = self.memory.client(self.client).device if self._at is None else self._at
        return self.memory.locations[at].name

    @location.store
    def _set_location(self, text: str) -> None:
        self._at = self._parse_location(text)

    @advice.store
    def _advise(self, text: str) -> None:
        region = self._allocated()
        word, _, where = text.strip().partition(" ")
        advice = next((known for known in Advice if known.value == word), None)
        if advice is None:
            raise OSError(errno.EINVAL, f"no advice {word!r}: there are {', '.join(a.value for a in Advice)}")
        location = self._parse_location(where) if where.strip() else None
        self.memory.advise(self.client, region.va, region.nr_bytes, advice, location)

    def _parse_location(self, text: str) -> int:
        names = self.memory.space.names
        if text.strip() not in names:
            raise OSError(errno.EINVAL, f"{text.strip()!r} is none of {', '.join(names)}")
        number = names.index(text.strip())
        return HOST if names[number] == "host" else number


class BufferGroup(ConfigGroup):
    """The buffers of one client."""

    def __init__(self, memory: GpuMemory, client: str) -> None:
        self.memory, self.client = memory, client

    def make_item(self, name: str) -> Kobject:
        check_name(name)
        return Buffer(self.memory, self.client, name)

    def drop_item(self, name: str, kobj: Kobject) -> None:
        assert isinstance(kobj, Buffer)
        kobj.release()


class ClientFiles(Kobject):
    """One client."""

    allocated_bytes = Attr(Text(), doc="Bytes in the client's buffers.")
    resident_bytes = Attr(Text(), doc="Of them, in devices' or host memory.")

    def __init__(self, memory: GpuMemory, name: str) -> None:
        self.memory, self.name = memory, name
        self._buffers = BufferGroup(memory, name)

    def children(self) -> Mapping[str, Kobject]:
        return {"buffers": self._buffers}

    @allocated_bytes.show
    def _allocated_bytes(self) -> str:
        return str(self.memory.client(self.name).nr_bytes)

    @resident_bytes.show
    def _resident_bytes(self) -> str:
        regions = self.memory.client(self.name).regions
        return str(sum(region.count(PageState.RESIDENT) << region.page_shift for region in regions))


class AdmittedClientFiles(ClientFiles, ClientPromises):
    """One client whose memory has to be admitted."""

    def __init__(self, memory: GpuMemory, name: str, admission: Overcommit) -> None:
        super().__init__(memory, name)
        self.admission = admission


class PacedClientFiles(AdmittedClientFiles, ClientBandwidth):
    """The same, whose bytes are paced, too."""

    def __init__(self, memory: GpuMemory, name: str, admission: Overcommit, qos: QosModule) -> None:
        super().__init__(memory, name, admission)
        self.qos = qos


class ClientGroup(ConfigGroup):
    """The clients of one device. Names are unique over all devices."""

    def __init__(self, memory: GpuMemory, device: int) -> None:
        self.memory, self.device = memory, device

    def make_item(self, name: str) -> Kobject:
        check_name(name)
        if name in self.memory.clients:
            raise OSError(errno.EEXIST, f"another device has a client {name}")
        self.memory.client(name, self.device)
        return self.files_of(name)

    def files_of(self, name: str) -> ClientFiles:
        """The directory of a client that is there."""
        admission = self.memory.accounting.admission
        qos = self.memory.residency.traffic
        if isinstance(admission, Overcommit):
            admission.account(name)  # by now, not by who looks first
            if isinstance(qos, QosModule):
                return PacedClientFiles(self.memory, name, admission, qos)
            return AdmittedClientFiles(self.memory, name, admission)
        return ClientFiles(self.memory, name)

    def drop_item(self, name: str, kobj: Kobject) -> None:
        self.memory.remove_client(name)


def show_client(registry: Registry, root: str, memory: GpuMemory, name: str) -> None:
    """A client that nobody made with mkdir: it came from elsewhere. What is there of its name is used again."""
    groups = [f"{root}/gpu{number}/clients" for number in range(memory.nr_devices)]
    known = [group for group in groups if f"{group}/{name}" in registry.nodes]
    group = (known or [groups[memory.client(name).device]])[0]
    client = f"{group}/{name}"
    if client not in registry.nodes:
        registry.add(client, ClientGroup(memory, memory.client(name).device).files_of(name))
    for number, region in enumerate(memory.client(name).regions):
        region.name = region.name or f"area{number}"
        path = f"{client}/buffers/{region.name}"
        if path not in registry.nodes:
            registry.add(path, Buffer(memory, name, region.name))
        node = registry.nodes[path]
        assert isinstance(node, Dir)
        (buffer,) = (kobj for kobj in node.kobjs if isinstance(kobj, Buffer))
        buffer.adopt(region)
