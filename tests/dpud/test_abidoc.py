# SPDX-License-Identifier: GPL-2.0-only
"""docs/abi.md says what the declarations say."""

from pathlib import Path

import pytest

from dpud import abidoc

PAGE = Path(__file__).parent.parent.parent / "docs" / "abi.md"


@pytest.fixture(scope="module")
def page() -> str:
    return abidoc.page()


@pytest.mark.slow
def test_the_page_is_up_to_date(page: str) -> None:
    assert PAGE.read_text() == page, "run: python -m dpud.abidoc > docs/abi.md"


@pytest.mark.parametrize(
    "row",
    [
        "| `dpu_compact_enabled` | 0644 | 0..1 | `1` |",
        "| `dpu_compact_min_fragments` | 0644 | 1..1024 | `32` |",
        "| `dpu_compact_region_order` | 0644 | 9..18 | `9` |",
        "| `compact_dpu` | 0200 | any text |  |",
        "| `pagetypeinfo` | 0400 |",
        "| `verify` | 0444 |",
    ],
)
def test_facts_of_the_interface_are_on_the_page(page: str, row: str) -> None:
    assert f"\n{row}" in page


def test_each_directory_has_one_table(page: str) -> None:
    directories = [line for line in page.splitlines() if line.startswith("## ")]
    assert len(set(directories)) == len(directories)
    assert "## /sys/devices/system/node/node*" in directories
    assert "## /sys/kernel/config/kernelsim/mm/NAME" in directories
    assert "## /sys/kernel/debug/dpu_compact/fail_KIND" in directories
