#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
# DPU compaction from user space: configure, fragment, try large blocks, compact, try again.
#
# Run as root over an emulated kernel: dpud exec -- sh tests/selftests/test_dpu_compact.sh
# TAP 13 on stdout; exit code 0 passed, 1 failed, 4 skipped (kselftest). Everything is put back at the end.

. "$(dirname "$0")/tap_helpers.sh"

VM=/proc/sys/vm
NODES=/sys/devices/system/node
MM=/sys/kernel/config/kernelsim/mm
STATS=/sys/kernel/debug/dpu_compact/stats
PROCESS=selftest-$$
ALLOC=/sys/kernel/config/kernelsim/alloc/$PROCESS
CHILD=$PROCESS-child

ALL=20000      # more 2 MiB pages than there are
HOLES_MIB=512  # half of the 1G that the process gets

# refuses ERROR VALUE FILE: the write fails with that error, and the file reads as before.
refuses() {
    before=$(cat "$3")
    message=$(put "$2" "$3" 2>&1) && return 1
    case $message in *": $1") ;; *) return 1 ;; esac
    [ "$(cat "$3")" = "$before" ]
}

unreadable() {
    message=$(cat "$1" 2>&1) && return 1
    case $message in *': Permission denied') ;; *) return 1 ;; esac
}

in_range() {
    [ "$1" -ge "$2" ] && [ "$1" -le "$3" ]
}

stat_of() {
    sed -n "s/^$1 //p" "$STATS"
}

# How many 2 MiB pages can be had without compacting for them: take all, count them, give them back.
hugepages() {
    put 1 "$ALLOC/alloc"
    cat "$ALLOC/allocated"
    put 1 "$ALLOC/free"
}

compact_all_nodes() {
    for node in "$NODES"/node*/compact_dpu; do
        put 1 "$node" || return
    done
}

put_back() {
    put "$enabled" $VM/dpu_compact_enabled
    put "$min_fragments" $VM/dpu_compact_min_fragments
    put "$region_order" $VM/dpu_compact_region_order
    put "$proactiveness" $VM/compaction_proactiveness
    [ ! -d "$ALLOC" ] || rmdir "$ALLOC"
    for name in "$CHILD" "$PROCESS"; do
        [ ! -d "$MM/$name" ] || rmdir "$MM/$name"
    done
}

echo "TAP version 13"
for file in $VM/dpu_compact_enabled $NODES/node0/compact_dpu $STATS $MM; do
    [ -e "$file" ] || skip "there is no $file"
done
[ -w $VM/dpu_compact_enabled ] || skip "$VM/dpu_compact_enabled cannot be written by uid $(id -u)"

enabled=$(cat $VM/dpu_compact_enabled)
min_fragments=$(cat $VM/dpu_compact_min_fragments)
region_order=$(cat $VM/dpu_compact_region_order)
proactiveness=$(cat $VM/compaction_proactiveness)
trap put_back EXIT
trap 'exit $KSFT_FAIL' HUP INT TERM

# While all large blocks are taken, what is left is fragmented: kcompactd would come and compact it.
put 0 $VM/compaction_proactiveness

echo "# Step 1: the configuration"
show "dpu_compact_enabled" echo "$enabled"
show "dpu_compact_min_fragments" echo "$min_fragments"
show "dpu_compact_region_order" echo "$region_order"
check "initialisation is in the kernel log" logged 'DPU Memory Compaction initialized'
check "dpu_compact_enabled is 0 or 1" in_range "$enabled" 0 1
check "dpu_compact_min_fragments is 1 to 1024" in_range "$min_fragments" 1 1024
check "dpu_compact_region_order is 9 to 18" in_range "$region_order" 9 18
for value in 2 -1 abc 1.5; do
    check "dpu_compact_enabled refuses $value" refuses 'Invalid argument' "$value" $VM/dpu_compact_enabled
done
for value in 0 1025 abc 99999999999999999999; do
    check "dpu_compact_min_fragments refuses $value" refuses 'Invalid argument' "$value" $VM/dpu_compact_min_fragments
done
for value in 8 19; do
    check "dpu_compact_region_order refuses $value" refuses 'Invalid argument' "$value" $VM/dpu_compact_region_order
done
check "dpu_compact_min_fragments takes 1024" accepts 1024 $VM/dpu_compact_min_fragments
check "dpu_compact_min_fragments takes 64" accepts 64 $VM/dpu_compact_min_fragments
check "dpu_compact_enabled takes 1" accepts 1 $VM/dpu_compact_enabled
check "dpu_compact_region_order takes 18" accepts 18 $VM/dpu_compact_region_order
check "compact_dpu cannot be read" unreadable $NODES/node0/compact_dpu

echo "# Step 2: fragment memory"
check "mkdir starts a process" mkdir "$MM/$PROCESS"
check "it gets 1 GiB" accepts 1073741824 "$MM/$PROCESS/anon"
check "it gives a random half back" put '50 seed=1' "$MM/$PROCESS/holes"
check "its fork shares the rest" put "$CHILD" "$MM/$PROCESS/fork"
check "holes refuses 101 percent" refuses 'Invalid argument' 101 "$MM/$PROCESS/holes"
show "buddyinfo" cat /proc/buddyinfo

echo "# Step 3: try large blocks"
check "mkdir makes somebody who allocates" mkdir "$ALLOC"
check "who asks for 2 MiB" accepts 9 "$ALLOC/order"
check "as a page fault does" accepts GFP_TRANSHUGE_LIGHT "$ALLOC/gfp"
check "for more than there are" accepts "$ALL" "$ALLOC/count"
before=$(hugepages)
echo "# $before pages of 2 MiB could be had"

echo "# Step 4: compact with the DPU"
moved=$(stat_of pages_moved)
check "compact_dpu of every node takes 1" compact_all_nodes
check "the DPU moved pages" [ "$(stat_of pages_moved)" -gt "$moved" ]
check "the batch is in the kernel log" logged 'DPU: Compacting [0-9]+ fragments at base 0x[0-9a-f]+'
check "its end is in the kernel log" logged 'DPU compaction completed: [0-9]+ pages moved in [0-9]+ ns'
check "the PTEs are in the kernel log" logged 'DPU mapping update completed: [0-9]+ PTEs updated in [0-9]+ ns'
check "the process finds every byte" reads ok "$MM/$PROCESS/verify"
check "and so does its child" reads ok "$MM/$CHILD/verify"
show "stats" cat $STATS

echo "# Step 5: try again"
after=$(hugepages)
echo "# $after pages of 2 MiB could be had, $((after - before)) more"
check "more 2 MiB pages than before" [ "$after" -gt "$before" ]
check "at least four fifths of the holes" [ $((after - before)) -ge $((HOLES_MIB / 2 * 4 / 5)) ]
show "buddyinfo" cat /proc/buddyinfo

echo "# Without the DPU"
put '25 seed=2' "$MM/$PROCESS/holes"
put '25 seed=2' "$MM/$CHILD/holes"
put 0 $VM/dpu_compact_enabled
moved=$(stat_of pages_moved)
cpu_moved=$(stat_of cpu_pages_moved)
check "compact_dpu works while dpu_compact_enabled is 0" compact_all_nodes
check "the DPU moved nothing" [ "$(stat_of pages_moved)" -eq "$moved" ]
check "the CPU did" [ "$(stat_of cpu_pages_moved)" -gt "$cpu_moved" ]
check "the process still finds every byte" reads ok "$MM/$PROCESS/verify"

echo "# Regions that are not worth a batch"
put 1 $VM/dpu_compact_enabled
put 9 $VM/dpu_compact_region_order
put 1024 $VM/dpu_compact_min_fragments
put '25 seed=3' "$MM/$PROCESS/holes"
put '25 seed=3' "$MM/$CHILD/holes"
too_few=$(stat_of too_few_fragments)
check "compact_dpu works with regions of 512 pages and at least 1024 fragments" compact_all_nodes
check "no batch was made of them" [ "$(stat_of too_few_fragments)" -gt "$too_few" ]
check "the DPU moved nothing then either" [ "$(stat_of pages_moved)" -eq "$moved" ]
check "the child still finds every byte" reads ok "$MM/$CHILD/verify"

check "rmdir ends the child" rmdir "$MM/$CHILD"
check "rmdir ends the process" rmdir "$MM/$PROCESS"

finish
