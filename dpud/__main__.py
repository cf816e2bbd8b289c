# SPDX-License-Identifier: GPL-2.0-only
"""`python -m dpud`."""

from dpud.cli import main

if __name__ == "__main__":
    main()
