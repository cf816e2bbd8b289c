# SPDX-License-Identifier: MIT
"""The hardware below: devices with memory, copy engines, streams and events.

`interface.py` is what the data path may use, `simulated.py` the device that needs no hardware. The interface has the
shape of cuda.core (Device, Buffer, Stream, Event), so that a CUDA backend is a translation and no redesign: `allocate(
size, stream)`, `copy_to`, `copy_from`, `record`, `event - event` are its names; `gather` and `scatter` are one
cuMemcpyBatchAsync; `view` is pointer arithmetic on `handle`.
"""
