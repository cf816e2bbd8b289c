# SPDX-License-Identifier: GPL-2.0-only
"""What went wrong for the user, as opposed to in the program."""


class UserError(Exception):
    """Its text is one line without a traceback; the command line prints it and exits with 2."""
