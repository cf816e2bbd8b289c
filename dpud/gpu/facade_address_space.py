# SPDX-License-Identifier: MIT
"""The C names of the unified address space.

`init_unified_address_space(total_size, page_size)`: all that is allocated together, in whole pages, is `total_size`
bytes at most. Memory behind them is what init_swap_system made, if it was called before, else a device of 256 MiB and
the host's. A pointer may be read and
written with `read_memory` and `write_memory`, which is what dereferencing it is in C.
"""

import errno
from typing import ClassVar

from dpud.gpu.address_space.permissions import EXECUTE, READ, WRITE, Permission
from dpud.gpu.address_space.regions import RegionType
from dpud.gpu.errors import GpuError
from dpud.gpu.facade_base import CLIENT, c_int, c_pointer, has_memory, the_memory, use_memory
from dpud.gpu.files import AddressSpaceFiles
from dpud.gpu.memory import DEFAULT_PAGE_BYTES, GpuMemory
from dpud.gpu.performance import set_log_level
from kernelsim.operation import complete

MEMORY_TYPE_HOST = RegionType.HOST
MEMORY_TYPE_DEVICE = RegionType.DEVICE
MEMORY_TYPE_MANAGED = RegionType.MANAGED
MEMORY_TYPE_PINNED = RegionType.PINNED

ACCESS_READ, ACCESS_WRITE, ACCESS_EXECUTE = READ, WRITE, EXECUTE
ACCESS_READ_WRITE = READ | WRITE


class _Unified:
    page_size = DEFAULT_PAGE_BYTES
    is_initialized = False
    total_size = 0
    sizes: ClassVar[dict[int, int]] = {}
    """Bytes of what is allocated, by address."""


@c_int
def init_unified_address_space(total_size: int, page_size: int) -> None:
    """EBUSY if it was called before; EINVAL for a page size that there is none of."""
    if _Unified.is_initialized:
        raise GpuError(errno.EBUSY, "initialized already")
    if page_size not in (2048, 4096, 65536, 2 << 20) or total_size < page_size:
        raise GpuError(errno.EINVAL, f"{total_size} bytes in pages of {page_size}")
    set_log_level()
    if not has_memory():
        use_memory(GpuMemory())
    _Unified.page_size, _Unified.total_size, _Unified.is_initialized = page_size, total_size, True
    _Unified.sizes.clear()


@c_pointer
def allocate_unified_memory(size: int, type: RegionType, permissions: int) -> int:
    """An address; its bytes read as zeros. ENOMEM beyond `total_size`, EINVAL for a type or flags that are none."""
    _check_initialized()
    if not isinstance(type, RegionType):
        raise GpuError(errno.EINVAL, f"memory type {type!r}")
    nr_bytes = -(-size // _Unified.page_size) * _Unified.page_size
    if sum(_Unified.sizes.values()) + nr_bytes > _Unified.total_size:
        raise GpuError(errno.ENOMEM, f"{nr_bytes} bytes more in an address space of {_Unified.total_size}")
    ptr = the_memory().allocate(CLIENT, size, type, _permission(permissions), page_size=_Unified.page_size)
    _Unified.sizes[ptr] = nr_bytes
    return ptr


@c_pointer
def access_unified_memory(ptr: int, required_permissions: int) -> int:
    """The same address, once the page is there; EACCES where the permissions are not, EFAULT where nothing is."""
    _check_initialized()
    return the_memory().access(CLIENT, ptr, _permission(required_permissions)).va


@c_int
def free_unified_memory(ptr: int) -> None:
    _check_initialized()
    the_memory().free(ptr, CLIENT)
    _Unified.sizes.pop(ptr, None)


@c_int
def sync_memory_region(ptr: int, size: int) -> None:
    """Afterwards the stores behind the devices have every byte of it. ENOSPC where they have no room."""
    _check_initialized()
    the_memory().sync(CLIENT, ptr, size)


@c_pointer
def read_memory(ptr: int, size: int) -> bytes:
    """What `*ptr` would be."""
    return the_memory().read(CLIENT, ptr, size)


@c_int
def write_memory(ptr: int, data: bytes) -> None:
    """memcpy(ptr, data, len)."""
    the_memory().write(CLIENT, ptr, data)


def get_address_space_stats() -> dict[str, int]:
    """Counters by name; empty before init."""
    if not has_memory():
        return {}
    files = AddressSpaceFiles(the_memory())
    texts = [complete(attr.read_text(files)).decode() for attr in files.attrs if attr.name in ("fault_stat", "stat")]
    counts = {name: int(value) for name, value in (line.split() for line in "".join(texts).splitlines())}
    hits, misses = (sum(getattr(tlb, name) for tlb in the_memory().space.tlbs) for name in ("nr_hits", "nr_misses"))
    return {"regions": len(the_memory().space.regions), "tlb_hits": hits, "tlb_misses": misses} | counts


def print_address_space_stats() -> None:
    print("Unified address space:")
    for name, value in get_address_space_stats().items():
        print(f"  {name:16} {value}")


def cleanup_unified_address_space() -> None:
    """Frees everything."""
    _Unified.is_initialized = False
    use_memory(None)


def _check_initialized() -> None:
    if not _Unified.is_initialized:
        raise GpuError(errno.ENODEV, "init_unified_address_space was not called")


def _permission(bits: int) -> Permission:
    """Of a C program's flags, which are a number."""
    if bits & ~int(READ | WRITE | EXECUTE):
        raise GpuError(errno.EINVAL, f"permissions {bits:#x}")
    return Permission(bits)
