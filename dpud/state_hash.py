# SPDX-License-Identifier: GPL-2.0-only
"""One hash over a daemon's whole state, which its journal brings back to the bit: kernel, files, GPUs, all bytes.

Left out is what the host alone decides and nobody but a reader of statistics sees: CPU times, the times that codecs
took, descriptors, and the salt of swap files, which are made anew; and what is only remembered, for whoever looks may
have done so: what was worked out, and texts that a reader has begun.
"""

import hashlib

from dpud.gpu.hal.simulated import SimulatedDevice
from dpud.gpu.memory import GpuMemory
from kernelsim.attr import Kobject
from kernelsim.digest import Digest
from kernelsim.machine import Machine

_NOT_HASHED = (
    *("memory", "clock", "_clock", "registry", "machine", "waiters", "on_short", "on_client"),
    *("encode_ns", "decode_ns", "_timer", "_workers"),
    *("file", "_file", "salt", "_salt"),
    *("_prediction", "_predictions", "shown", "_shown", "_drawn"),
)
"""Attributes. Memory is hashed as such; what a tier's file holds is known by the checksums of its slots."""


def state_hash(machine: Machine, gpu: GpuMemory | None) -> str:
    """For whoever holds the machine."""
    return hashlib.sha256(f"{machine.whole_hash()} {gpu_hash(machine, gpu)}".encode()).hexdigest()


def gpu_hash(machine: Machine, gpu: GpuMemory | None) -> str:
    """Of the GPUs' side alone."""
    if gpu is None:
        return ""
    digest = Digest(("dpud.gpu", "kernelsim"), _NOT_HASHED)
    digest.add(gpu)
    digest.add(_files(machine))
    for location in gpu.locations:
        if isinstance(location.hardware, SimulatedDevice):
            digest.add(location.hardware.memory)
    return digest.hexdigest()


def _files(machine: Machine) -> list[Kobject]:
    found = {id(kobj): kobj for _, kobj, _ in machine.registry.walk() if type(kobj).__module__.startswith("dpud.gpu.")}
    return list(found.values())
