# SPDX-License-Identifier: MIT
"""Compression of pages: codecs, the choice between them, and a packed pool.

encoder.py, decoding there too    a page to a Blob and back
codec.py, lz.py, planes.py        the formats, one registered class each
chooser.py                        which of them for which page
dictionary.py                     zstd dictionaries by client
system.py                         batches, worker threads, what is learnt
pool.py, arena.py, columns.py, index.py   encoded pages by key, packed
files.py                          all of it as files
"""

from dpud.gpu.compression.codec import Codec, Quality, register
from dpud.gpu.compression.files import CompressionFiles
from dpud.gpu.compression.pool import CompressedPool
from dpud.gpu.compression.system import CompressionSystem

__all__ = ["Codec", "CompressedPool", "CompressionFiles", "CompressionSystem", "Quality", "register"]
