# SPDX-License-Identifier: GPL-2.0-only
"""Fuzzing: every parser and every file of the tree, given what nobody would write.

Theory of operation
    A Target is something that takes bytes from outside. It opens a World, to which inputs are given one after the
    other. Each must end well, or be refused with one of the errors that its documentation names. Anything else is a
    crash: another exception, one that was only logged, an invariant that is violated, more than LIMIT_NS of CPU time,
    memory that grows without bound, or the end of the process.

    Inputs come from a World itself (`draw`: seeds, mutated with the grammar in mind) or, for those that are pure
    functions, from atheris, which looks at what code they reach. Both go by a seed, so that a run can be had again.

    target.py   Target, World, and the World of a pure function
    mutate.py   how an input becomes another one
    texts.py    configuration, captures, traces, units
    binaries.py journal, checkpoints, slots, compressed pages
    stream.py   migrations, both ways
    tree.py     the files of a machine
    live.py     gives inputs to one World, and shrinks what it finds
    child.py    the same in a process of its own, which may die and may write nowhere
    coverage.py the same with atheris

To add a target, add it to targets.py.
"""
