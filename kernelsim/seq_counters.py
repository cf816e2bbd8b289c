# SPDX-License-Identifier: GPL-2.0-only
"""Texts that are numbers of the machine in a form that stays: buddyinfo, vmstat, zoneinfo.

Theory of operation
    Each number of such a text is a sum of counters, 64-bit words in arrays of records. So a text is described once, by
    where its words are, and from then on a compiled loop makes it, in microseconds and without the interpreter. The
    form holds as long as the same zones have pages (`conditions`); who finds that it does not has it described anew.

    Whoever holds the machine gets the text as it is now. But `render` may also be called by those who do not hold it,
    as the server of files does (fs/fuse_loop.py): the arrays stay where they are while the form is kept, words are read
    whole, and any numbers fit into the room. What comes out may then be of no moment at all, and the caller has to know
    whether anybody held the machine meanwhile (attr_node.Changes).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kernelsim.jit import i64, njit
from kernelsim.raw_memory import load, store
from kernelsim.seq_printf import Template, fill

form_dtype = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("pieces", "piece_ends", "widths", "nr_values", "text_bytes"),
            *("terms", "term_ends", "shifts", "limits", "conditions", "nr_conditions"),
        )
    ]
)
"""Addresses of what describes a text, and how much there is. text_bytes: room that it needs, whatever the numbers."""
_LOWEST = -(2**63) + 1


class Words:
    """Where the 64-bit words of an array of records are."""

    def __init__(self, records: Any) -> None:
        self.records = records
        self._address, self._row_bytes = int(records.ctypes.data), int(records.itemsize)

    def at(self, row: int, word: int) -> int:
        """Address of a word of a record; of the array's rows in the order of memory."""
        return self._address + row * self._row_bytes + word * 8


class Number(NamedTuple):
    """The sum of words, each (address, factor), shifted to the right; with a limit, 1 or 0: whether that is reached."""

    terms: Sequence[tuple[int, int]]
    shift: int = 0
    limit: int = 0


def number(addresses: Iterable[int], shift: int = 0, limit: int = 0) -> Number:
    """The sum of the words there."""
    return Number([(address, 1) for address in addresses], shift, limit)


class CounterText:
    """One text. It keeps what it reads from.

    form        as a Template's
    numbers     what goes into its places
    conditions  (address of a word, whether it is positive): as long as that is so the form is right
    arrays      what the addresses lie in
    """

    def __init__(
        self, form: str, numbers: Sequence[Number], conditions: Iterable[tuple[int, bool]], arrays: Sequence[Words]
    ) -> None:
        template = Template(form)
        assert len(numbers) == template.nr_values
        terms = [term for each in numbers for term in each.terms]
        self._arrays = [words.records for words in arrays]
        self._kept: dict[str, NDArray[Any]] = {
            "pieces": template.pieces,
            "piece_ends": template.ends,
            "widths": template.widths,
            "terms": np.array(terms, dtype=np.int64).reshape(-1, 2),
            "term_ends": np.cumsum([len(each.terms) for each in numbers], dtype=np.int64),
            "shifts": np.array([each.shift for each in numbers], dtype=np.int64),
            "limits": np.array([each.limit for each in numbers], dtype=np.int64),
            "conditions": np.array(list(conditions), dtype=np.int64).reshape(-1, 2),
        }
        self.form = _described(template, self._kept)
        self.room_bytes = int(self.form["text_bytes"][0]) + 8 * len(numbers)
        self._room = np.empty(self.room_bytes, dtype=np.uint8)

    def holds(self) -> bool:
        """Is the form right? For whoever holds the machine."""
        return bool(_holds_of(self.form))

    def text(self) -> bytes:
        """As of now; for whoever holds the machine, while it `holds`."""
        return self._room[: _render_of(self.form, self._room)].tobytes()


class CounterFile:
    """The text of one file, described anew by `describe` where it has to be."""

    def __init__(self, describe: Callable[[], CounterText]) -> None:
        self._describe = describe
        self.counter_text: CounterText | None = None

    def now(self) -> CounterText:
        """For whoever holds the machine."""
        found = self.counter_text
        if found is None or not found.holds():
            found = self.counter_text = self._describe()
        return found


def _described(template: Template, arrays: dict[str, NDArray[Any]]) -> NDArray[Any]:
    form: NDArray[Any] = np.zeros(1, dtype=form_dtype)
    for name, array in arrays.items():
        form[name] = array.ctypes.data
    form["nr_values"], form["nr_conditions"] = template.nr_values, len(arrays["conditions"])
    form["text_bytes"] = template.room_bytes + 7 & -8
    return form


@njit
def render(form: Any, room: int) -> int:
    """Make the text that a record of `form_dtype` describes -> its bytes; -1: the form is not right any more.

    `room`: address of text_bytes for the text and 8 more for each number, of which no more is read afterwards.
    """
    if not _holds(form):
        return -1
    values, term = room + form.text_bytes, form.terms
    for place in range(form.nr_values):
        end, total = form.terms + 16 * load(form.term_ends + 8 * place), i64(0)
        while term < end:
            total += load(load(term)) * load(term + 8)
            term += 16
        limit = load(form.limits + 8 * place)
        shown = i64(total >= limit) if limit else max(total >> load(form.shifts + 8 * place), _LOWEST)
        store(values + 8 * place, shown)
    return fill(form.pieces, form.piece_ends, form.widths, values, form.nr_values, room)


@njit
def _holds(form: Any) -> bool:
    for condition in range(form.conditions, form.conditions + 16 * form.nr_conditions, 16):
        if (load(load(condition)) > 0) != load(condition + 8):
            return False
    return True


@njit
def _render_of(form: Any, room: Any) -> int:
    return render(form[0], i64(room.ctypes.data))


@njit
def _holds_of(form: Any) -> bool:
    return _holds(form[0])
