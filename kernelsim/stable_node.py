# SPDX-License-Identifier: GPL-2.0-only
"""KSM's stable tree: the pages that were merged, and by which places each can be found in page tables (mm/ksm.c).

Theory of operation
    A KSM page (PG_ksm, beside PG_anon) belongs to no anon_vma. Its `mapping` is the number of its stable node, an rmap
    object whose chain is a list of *places*, pairs of an anon_vma and an index there (rmap.py). The head of the chain
    has the page's pfn, which moves with the page (folio_migrate).

    A place is Linux's rmap_item in its part for the rmap: made for one virtual page that was merged, it also leads to
    the same page of whatever was forked from that VMA, because a child's VMA is in its parent's chains. So fork, munmap
    and COW need not know of places at all: one that nothing is mapped at any more is a dead end, not a mistake.

    An anon_vma that is named by a place is kept when its last VMA goes, as by get_anon_vma().

    Nodes are found by checksum. Of one content there is a chain of nodes (stable_node_dup) once a node has
    max_page_sharing merged pages.

Invariants
    - Every PTE of a KSM page is led to by a place of its node.
    - A place without a merged page (`orphans`) led to a mapping when its merged page went: a child's. It goes when that
      is no more.

Differences from Linux: a hash in place of a red-black tree of contents; no merge is decided by it, the bytes are
compared. A child's mappings can always be found (Linux finds them until ksmd unmerges the parent's, and again once it
has scanned the child's).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeAlias

from kernelsim.jit import njit
from kernelsim.page import Pages, PG_ksm
from kernelsim.pgtable import _PAGE_MIGRATION, _PAGE_PRESENT, PageTables, pte_pfn, walk_pte
from kernelsim.rmap import Avcs, Vmas, vma_address

if TYPE_CHECKING:
    from kernelsim.mm_types import Vm

Key: TypeAlias = tuple[int, int]
"""Node (0 where pages are merged across nodes) and checksum."""
Place: TypeAlias = tuple[int, int]
"""anon_vma and index there."""


@njit
def is_mapped_at(vmas: Vmas, avcs: Avcs, pt: PageTables, mapping: int, index: int, pfn: int) -> bool:
    """Some VMA maps the page, or waits for it to have moved, as page `index` of an rmap object."""
    avc = avcs[mapping].next
    while avc != 0:
        vma = avcs[avc].vma
        vpn = vma_address(vmas, vma, index)
        ptep = walk_pte(pt, vmas[vma].root, vpn) if vpn >= 0 else -1
        if ptep >= 0 and pt[ptep] & (_PAGE_PRESENT | _PAGE_MIGRATION) and pte_pfn(pt[ptep]) == pfn:
            return True
        avc = avcs[avc].next
    return False


@njit
def make_ksm(pages: Pages, avcs: Avcs, pfn: int, node: int) -> tuple[int, int]:
    """Give an anonymous page to a stable node -> the anon_vma and the index it had (folio_set_stable_node)."""
    before = int(pages[pfn].mapping), int(pages[pfn].index)
    pages[pfn].flags |= PG_ksm
    pages[pfn].mapping = node
    avcs[node].i_base = pfn
    return before


class StableNode:
    """One KSM page. `number` is that of its rmap object."""

    def __init__(self, number: int, key: Key) -> None:
        self.number = number
        self.key = key
        self.nr_items = 0
        """Merged virtual pages (rmap_hlist_len)."""
        self.places: dict[Place, int] = {}
        """And their rows in the table of avcs."""
        self.orphans: set[Place] = set()


class StableTree:
    """All nodes."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self.merge_across_nodes = True
        self.nodes: dict[int, StableNode] = {}
        self._by_key: dict[Key, list[StableNode]] = {}

    def key(self, pfn: int, checksum: int) -> Key:
        mem = self.vm.mem
        return (0 if self.merge_across_nodes else int(mem.zones["node"][mem.pages["zone"][pfn]])), checksum

    def pfn(self, node: StableNode) -> int:
        return int(self.vm.avcs["i_base"][node.number])

    def of_page(self, pfn: int) -> StableNode | None:
        """The node of a KSM page; None for others, and for those that were imported as such."""
        page = self.vm.mem.pages[pfn]
        return self.nodes.get(int(page["mapping"])) if page["flags"] & PG_ksm else None

    def search(self, key: Key, max_page_sharing: int) -> StableNode | None:
        """The fullest node of a content that has room for one more (stable_node_dup)."""
        with_room = [node for node in self._by_key.get(key, ()) if node.nr_items < max_page_sharing]
        return max((node for node in with_room if self._has_page(node)), key=lambda node: node.nr_items, default=None)

    def insert(self, pfn: int, key: Key) -> StableNode:
        """Make an anonymous page a KSM page; it can be found as before."""
        vm = self.vm
        number = vm.take_mapping()
        node = self.nodes[number] = StableNode(number, key)
        self._by_key.setdefault(key, []).append(node)
        place = make_ksm(vm.mem.pages, vm.avcs, pfn, number)
        self._add_place(node, place)
        node.orphans.add(place)
        return node

    def append(self, node: StableNode, place: Place) -> None:
        """One more merged page, which is to be found here (stable_tree_append)."""
        node.nr_items += 1
        node.orphans.discard(place)
        if place not in node.places:
            self._add_place(node, place)

    def remove(self, number: int, place: Place) -> None:
        """One merged page less: it was written to, or is gone."""
        node = self.nodes[number]
        node.nr_items -= 1
        node.orphans.add(place)
        self._prune_node(node)

    def prune(self) -> None:
        """Forget the places that lead nowhere any more, and nodes without a page."""
        for node in list(self.nodes.values()):
            if node.orphans or not node.nr_items:
                self._prune_node(node)

    def rehome(self) -> None:
        """Nodes whose pages have moved to another NUMA node (migrate_nodes)."""
        for node in self.nodes.values():
            key = self.key(self.pfn(node), node.key[1])
            if key != node.key and self._has_page(node):
                self._leave_chain(node)
                node.key = key
                self._by_key.setdefault(key, []).append(node)

    # Counts.

    @property
    def pages_shared(self) -> int:
        return sum(1 for node in self.nodes.values() if node.nr_items)

    @property
    def nr_items(self) -> int:
        return sum(node.nr_items for node in self.nodes.values())

    @property
    def chains(self) -> list[int]:
        """The length of each chain of nodes of one content."""
        return [len(nodes) for nodes in self._by_key.values() if len(nodes) > 1]

    def violations(self) -> Iterator[str]:
        """What is wrong with it, one line each."""
        avcs = self.vm.avcs
        for node in self.nodes.values():
            linked = {int(avc): (int(avcs["vma"][avc]), int(avcs["i_base"][avc])) for avc in self._chain(node)}
            if linked != {avc: place for place, avc in node.places.items()}:
                yield f"stable node {node.number}: its chain is not its places"
        named = Counter(place[0] for node in self.nodes.values() for place in node.places)
        for mapping, nr in named.items():
            if avcs["i_base"][mapping] != nr:
                yield f"anon_vma {mapping}: named by {nr} places, counts {avcs['i_base'][mapping]}"

    # Places and pages.

    def _chain(self, node: StableNode) -> Iterator[int]:
        avc = int(self.vm.avcs["next"][node.number])
        while avc:
            yield avc
            avc = int(self.vm.avcs["next"][avc])

    def _has_page(self, node: StableNode) -> bool:
        """The page is still this node's; a frame that was freed belongs to nobody, or to others (ksm_get_folio)."""
        page = self.vm.mem.pages[self.pfn(node)]
        return bool(page["flags"] & PG_ksm and page["mapping"] == node.number)

    def _add_place(self, node: StableNode, place: Place) -> None:
        node.places[place] = self.vm.link(node.number, *place)
        self.vm.avcs["i_base"][place[0]] += 1

    def _drop_place(self, node: StableNode, place: Place) -> None:
        self.vm.unlink_avc(node.number, node.places.pop(place))
        node.orphans.discard(place)
        self.vm.avcs["i_base"][place[0]] -= 1
        self.vm.put_anon_vma(place[0])

    def _prune_node(self, node: StableNode) -> None:
        vm, pfn, has_page = self.vm, self.pfn(node), self._has_page(node)
        for place in sorted(node.orphans):
            if not (has_page and is_mapped_at(vm.vmas, vm.avcs, vm.pt, *place, pfn)):
                self._drop_place(node, place)
        if node.nr_items == 0 and not has_page:
            self._leave_chain(node)
            del self.nodes[node.number]
            vm.release_mapping(node.number)

    def _leave_chain(self, node: StableNode) -> None:
        nodes = self._by_key[node.key]
        nodes.remove(node)
        if not nodes:
            del self._by_key[node.key]
