#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
# CMA areas from user space: fill the area with a process, take it from under it, give it back.
#
# Run as root over an emulated kernel with an area: dpud exec --config tests/selftests/test_cma.toml -- sh THIS
# TAP 13 on stdout; exit code 0 passed, 1 failed, 4 skipped (kselftest). Everything is put back at the end.

. "$(dirname "$0")/tap_helpers.sh"

VM=/proc/sys/vm
MM=/sys/kernel/config/kernelsim/mm
CMA=/sys/kernel/debug/cma/pernuma0
STATS=/sys/kernel/debug/dpu_compact/contig_stats
PROCESS=selftest-$$

# figure NAME FILE: of a file with `NAME value` or `NAME: value kB` lines.
figure() {
    sed -n "s/^$1:\{0,1\} *\([0-9]*\).*/\1/p" "$2"
}

# move_in: let the process have most of the memory, anew; there is no room for the old and the new.
move_in() {
    put 0 "$MM/$PROCESS/anon" && put 420M "$MM/$PROCESS/anon"
}

put_back() {
    put 1000000 $CMA/free
    put "$enabled" $VM/dpu_compact_enabled
    [ ! -d "$MM/$PROCESS" ] || rmdir "$MM/$PROCESS"
}

echo "TAP version 13"
for file in $CMA/alloc $STATS $MM; do
    [ -e "$file" ] || skip "there is no $file"
done
enabled=$(cat $VM/dpu_compact_enabled)
trap put_back EXIT
trap 'exit $KSFT_FAIL' HUP INT TERM

echo "# Step 1: the area"
count=$(cat $CMA/count)
echo "# $count pages from page $(cat $CMA/base_pfn) on"
check "the reservation is in the kernel log" logged "cma: Reserved $((count / 256)) MiB at 0x[0-9a-f]+ on node 0"
check "pages of its pageblocks are free CMA pages" [ "$(figure nr_free_cma /proc/vmstat)" -eq "$count" ]
check "meminfo has it in kB" [ "$(figure CmaTotal /proc/meminfo)" -eq $((count * 4)) ]
check "pagetypeinfo has the type" grep -q 'type          CMA' /proc/pagetypeinfo
check "nothing of it is used" reads 0 $CMA/used
check "all of it is one chunk" reads "$count" $CMA/maxchunk
check "one bit stands for one page" reads 0 $CMA/order_per_bit
for value in abc -1 1.5; do
    check "alloc refuses $value" fails 'Invalid argument' "$value" $CMA/alloc
    check "free refuses $value" fails 'Invalid argument' "$value" $CMA/free
done
for value in 0 $((count + 1)); do
    check "alloc of $value pages fails" fails 'Cannot allocate memory' "$value" $CMA/alloc
done

echo "# Step 2: a process moves in"
check "mkdir starts a process" mkdir "$MM/$PROCESS"
check "it gets most of the memory" move_in
check "movable pages are in the area" [ "$(figure nr_free_cma /proc/vmstat)" -lt $((count * 3 / 4)) ]

echo "# Step 3: take the area from under it"
moved=$(figure dpu_pages_moved $STATS)
check "the whole area can be had" put "$count" $CMA/alloc
check "used is all of it" reads "$count" $CMA/used
check "no CMA page is free" [ "$(figure nr_free_cma /proc/vmstat)" -eq 0 ]
check "the DPU moved what lived there" [ "$(figure dpu_pages_moved $STATS)" -gt "$moved" ]
check "the batch is in the kernel log" logged 'DPU: Moving [0-9]+ fragments from 0x[0-9a-f]+'
check "its end is in the kernel log" logged 'DPU move completed: [0-9]+ fragments moved in [0-9]+ ns'
check "the process finds every byte" reads ok "$MM/$PROCESS/verify"
check "one page more is too much" fails 'Cannot allocate memory' 1 $CMA/alloc
check "which is in the log" logged 'cma: __cma_alloc: pernuma0: alloc failed, req-size: 1 pages, ret: -12'
check "and counted" [ "$(figure cma_alloc_fail /proc/vmstat)" -eq 1 ]

echo "# Step 4: give it back, in two steps"
check "half of it is freed" put $((count / 2)) $CMA/free
check "which is half less used" reads $((count - count / 2)) $CMA/used
check "in one chunk" reads $((count / 2)) $CMA/maxchunk
check "the rest is freed" put "$count" $CMA/free
check "nothing is used" reads 0 $CMA/used
check "all is free" [ "$(figure nr_free_cma /proc/vmstat)" -eq "$count" ]

echo "# Step 5: by CPU, and with pinned pages"
put 0 $VM/dpu_compact_enabled
move_in
moved=$(figure cpu_pages_moved $STATS)
put "$count" $CMA/alloc
check "without the DPU the CPU moves pages" [ "$(figure cpu_pages_moved $STATS)" -gt "$moved" ]
check "the process still finds every byte" reads ok "$MM/$PROCESS/verify"
put 1 $VM/dpu_compact_enabled
put "$count" $CMA/free
move_in
check "a third of it can be pinned" put 30 "$MM/$PROCESS/pin"
check "which left the area, so it can be had whole" put "$count" $CMA/alloc
check "no page was in the way" [ "$(figure busy_pinned $STATS)" -eq 0 ]
check "and every byte is still there" reads ok "$MM/$PROCESS/verify"
check "rmdir ends the process" rmdir "$MM/$PROCESS"

finish
