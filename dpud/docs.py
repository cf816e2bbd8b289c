# SPDX-License-Identifier: GPL-2.0-only
"""Everything that is written down by a program: `python -m dpud.docs` (or `make docs`) writes it anew.

docs/abi.md, the manual pages in docs/man and the completions are in the repository, so that they can be read without
being made; a test says when they are stale.
"""

import sys
from pathlib import Path

from dpud import abidoc, completions, manpages
from dpud.dpu.driver import DpuConfig, DpuDriver

ROOT = Path(__file__).parent.parent


def files() -> dict[str, str]:
    """Path in the repository -> text of each file."""
    driver = DpuDriver(DpuConfig(nr_ranks=1))
    try:
        pages = manpages.pages(abidoc.example(driver))
    finally:
        driver.close()
    made = {"docs/abi.md": abidoc.page()} | {f"docs/man/{name}": text for name, text in pages.items()}
    return made | {"completions/dpud.bash": completions.bash(), "completions/_dpud": completions.zsh()}


def left_over(made: dict[str, str]) -> list[Path]:
    """Manual pages that nothing makes any more."""
    return [path for path in sorted((ROOT / "docs" / "man").glob("*")) if f"docs/man/{path.name}" not in made]


def main() -> None:
    made = files()
    for name, text in made.items():
        path = ROOT / name
        if not path.is_file() or path.read_text() != text:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            print(name, file=sys.stderr)
    for path in left_over(made):
        path.unlink()
        print(f"{path.relative_to(ROOT)}: removed", file=sys.stderr)


if __name__ == "__main__":
    main()
