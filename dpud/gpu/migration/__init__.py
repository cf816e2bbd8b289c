# SPDX-License-Identifier: MIT
"""Hot migration: a client's memory moves to another device, or to another daemon, while the client goes on using it.

pages.py                      what is moved: areas of pages; who has them (Source), who takes them (Sink)
client_pages.py, file_pages.py, process_pages.py    sources and sinks: a client's regions, a file, a real process
converge.py                   the arithmetic of pre-copy
engine.py                     rounds, choice of strategy, switch, ownership
device_target.py, remote_target.py    where to: another device, another daemon
receiver.py                   the other daemon's side
wire.py, encoding.py, channel.py      frames, pages in them, connections
journal.py, recovery.py       promises, and what a killed side finds of them
module.py, files.py           all of it as a part of a GpuMemory, and as files
"""

from dpud.gpu.migration.files import MigrationFiles
from dpud.gpu.migration.module import MigrationModule

__all__ = ["MigrationFiles", "MigrationModule"]
