# SPDX-License-Identifier: GPL-2.0-only
"""What traced code needs to know of tracing: three names, and what they are while nobody traces.

`vm.trace(event, *values)` is a tracepoint, `vm.pr_debug(format, *args)` a message that dynamic debug can switch on, and
`@traced("name")` marks the method that stands for a kernel function. A Machine puts trace.Trace and
dynamic_debug.DynamicDebug into its Vm (tracing.py). This module imports nothing: all compiled loops would have to be
compiled again with each change of what stands behind these names.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

FTRACE_NAME = "_ftrace_name"
"""Attribute of a marked method: the kernel function that it stands for."""


def traced(name: str) -> Callable[[F], F]:
    """Mark a method as the kernel function `name`; see ftrace.py."""

    def mark(method: F) -> F:
        setattr(method, FTRACE_NAME, name)
        return method

    return mark


class TraceHook(Protocol):
    """Where tracepoints go."""

    def __call__(self, event: Any, /, *values: Any) -> None:
        """Record a TraceEvent if it is on."""
        ...

    def is_on(self, event: Any, /) -> bool:
        """Whether it is worth making up its values."""
        ...


class NoTrace:
    """The TraceHook of a Vm that is no machine's."""

    def __call__(self, event: Any, /, *values: Any) -> None:
        pass

    def is_on(self, _event: Any, /) -> bool:
        return False


def no_debug(_fmt: str, *_args: Any) -> None:
    """pr_debug() of a kernel without dynamic debug."""
