# SPDX-License-Identifier: GPL-2.0-only
"""The demo's machine once more, as a library.

No file tells where in memory the free pages lie, so the demo draws its pictures from a twin: the same capture, built in
the demo's own process and given the same writes. That it is still the same machine is checked, not assumed.
"""

from dpud.capture import DEMO, read_capture
from dpud.demo.blockmap import BlockMap
from dpud.dpu.driver import DpuDriver
from dpud.physmem import PhysMem
from kernelsim.attr import ConfigGroup, Dir, complete, outcome
from kernelsim.machine import Machine


class Twin:
    """The captured machine; `close` it."""

    def __init__(self) -> None:
        self._driver = DpuDriver()
        self._machine = Machine.from_image(read_capture(DEMO), None, self._driver, alloc_words=PhysMem().alloc)

    def close(self) -> None:
        self._driver.close()

    def write(self, path: str, text: str) -> None:
        """What was written to the mounted machine's file."""
        self._machine.registry.write(path, text)

    def mkdir(self, path: str) -> None:
        """What was made in a configfs directory of the mounted machine."""
        parent, _, name = path.rpartition("/")
        registry = self._machine.registry
        directory = registry.nodes[parent]
        assert isinstance(directory, Dir)
        group = next(kobj for kobj in directory.kobjs if isinstance(kobj, ConfigGroup))
        registry.add(path, complete(outcome(group.make_item(name))))

    def map(self, buddyinfo: str) -> BlockMap:
        """The memory of the mounted machine, whose /proc/buddyinfo reads so. Raises RuntimeError if ours differs."""
        if self._machine.registry.read("/proc/buddyinfo").decode() != buddyinfo:
            raise RuntimeError("the mounted machine and its twin are not the same any more")
        return BlockMap.of(self._machine.mem)
