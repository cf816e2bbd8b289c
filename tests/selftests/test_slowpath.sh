#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
# The allocation slow path from user space: who may compact gets a large block, by the DPU first, who may not fails.
#
# Run as root over an emulated kernel: dpud exec -- sh tests/selftests/test_slowpath.sh
# TAP 13 on stdout; exit code 0 passed, 1 failed, 4 skipped (kselftest). Everything is put back at the end.

. "$(dirname "$0")/tap_helpers.sh"

VM=/proc/sys/vm
MM=/sys/kernel/config/kernelsim/mm
ALLOC=/sys/kernel/config/kernelsim/alloc
STATS=/sys/kernel/debug/dpu_compact/stats
PROCESS=slowpath-$$
DRAIN=$ALLOC/drain-$$
WHO=who-$$

KSFT_FAIL=1
KSFT_SKIP=4
PATIENCE_S=20

# value NAME FILE: of a file of `name value` lines.
value() {
    sed -n "s/^$1 //p" "$2"
}

# grew NAME FILE OLD
grew() {
    [ "$(value "$1" "$2")" -gt "$3" ]
}

same() {
    [ "$(value "$1" "$2")" -eq "$3" ]
}

result_above() {
    [ "$(value "$1" "$ALLOC/$WHO/result")" -gt "$2" ]
}

logged() {
    dmesg | grep -Eq "] $1"
}

# Take every 2 MiB block that can be had without compacting, then what only atomic requests may have.
drain() {
    for gfp in GFP_TRANSHUGE_LIGHT '__GFP_HIGH|__GFP_NOWARN'; do
        put "$gfp" "$DRAIN/gfp"
        put 1 "$DRAIN/alloc" 2>/dev/null || true
    done
}

# Until the background has moved pages, or patience ends.
compacts_by_itself() {
    moved=$(value pgmigrate_success /proc/vmstat)$(value dpu_compact_pages_moved /proc/vmstat)
    waited=0
    while [ $waited -lt $PATIENCE_S ]; do
        cat /proc/buddyinfo >/dev/null || return 1
        now=$(value pgmigrate_success /proc/vmstat)$(value dpu_compact_pages_moved /proc/vmstat)
        [ "$now" = "$moved" ] || return 0
        sleep 1
        waited=$((waited + 1))
    done
    return 1
}

put_back() {
    for directory in "$ALLOC/$WHO" "$DRAIN" "$MM/$PROCESS"; do
        [ ! -d "$directory" ] || rmdir "$directory"
    done
    put "$enabled" $VM/dpu_compact_enabled
    put "$min_free" $VM/min_free_kbytes
    put "$proactiveness" $VM/compaction_proactiveness
}

echo "TAP version 13"
for file in $VM/dpu_compact_enabled $VM/compaction_proactiveness $VM/min_free_kbytes $STATS $MM $ALLOC; do
    [ -e "$file" ] || skip "there is no $file"
done
[ -w $VM/min_free_kbytes ] || skip "$VM/min_free_kbytes cannot be written by uid $(id -u)"

enabled=$(cat $VM/dpu_compact_enabled)
min_free=$(cat $VM/min_free_kbytes)
proactiveness=$(cat $VM/compaction_proactiveness)
trap put_back EXIT
trap 'exit $KSFT_FAIL' HUP INT TERM

put 1 $VM/dpu_compact_enabled
put 0 $VM/compaction_proactiveness # until its turn comes

echo "# Somebody who allocates"
check "mkdir makes one" mkdir "$ALLOC/$WHO"
check "order takes 9" accepts 9 "$ALLOC/$WHO/order"
check "order refuses 11" fails 'Invalid argument' 11 "$ALLOC/$WHO/order"
check "gfp takes flags by name" accepts 'GFP_KERNEL|__GFP_NORETRY' "$ALLOC/$WHO/gfp"
put 0x820 "$ALLOC/$WHO/gfp"
check "gfp takes a number" reads GFP_ATOMIC "$ALLOC/$WHO/gfp"
check "gfp refuses what is no flag" fails 'Invalid argument' GFP_KERNAL "$ALLOC/$WHO/gfp"
check "and reads as before" reads GFP_ATOMIC "$ALLOC/$WHO/gfp"
check "node refuses one that is not there" fails 'Invalid argument' 1000 "$ALLOC/$WHO/node"
check "count refuses 0" fails 'Invalid argument' 0 "$ALLOC/$WHO/count"

echo "# Fragment memory: random halves of two GiB, and no 2 MiB block left"
check "mkdir starts a process" mkdir "$MM/$PROCESS"
check "it gets 2 GiB" accepts 2147483648 "$MM/$PROCESS/anon"
check "it gives a random half back" put '50 seed=1' "$MM/$PROCESS/holes"
mkdir "$DRAIN"
put 9 "$DRAIN/order"
put 5000 "$DRAIN/count"
drain
check "blocks of 2 MiB were there" [ "$(cat "$DRAIN/allocated")" -gt 0 ]

echo "# Who may not block"
stall=$(value compact_stall /proc/vmstat)
regions=$(value dpu_compact_regions /proc/vmstat)
check "GFP_ATOMIC gets none" fails 'Cannot allocate memory' 1 "$ALLOC/$WHO/alloc"
check "the log says so" logged "$WHO: page allocation failure: order:9, mode:0x820\(GFP_ATOMIC\)"
check "and what memory there is" logged 'Mem-Info:'
check "nobody compacted for it" same compact_stall /proc/vmstat "$stall"
check "nor did the DPU" same dpu_compact_regions /proc/vmstat "$regions"

echo "# Who may: the DPU first"
put GFP_KERNEL "$ALLOC/$WHO/gfp"
put 20 "$ALLOC/$WHO/count"
success=$(value compact_success /proc/vmstat)
check "GFP_KERNEL gets 20" put 1 "$ALLOC/$WHO/alloc"
check "20 are held" reads 20 "$ALLOC/$WHO/allocated"
check "some by the DPU" result_above by_dpu 0
check "which took modelled time" result_above device_ns_max 0
check "compact_success counts them" grew compact_success /proc/vmstat "$success"
check "the DPU moved pages" grew dpu_compact_regions /proc/vmstat "$regions"
check "the process finds every byte" reads ok "$MM/$PROCESS/verify"
sed 's/^/#   /' "$ALLOC/$WHO/result"

echo "# Without the DPU: the two scanners"
put 0 $VM/dpu_compact_enabled
put 1 "$ALLOC/$WHO/free"
drain
regions=$(value dpu_compact_regions /proc/vmstat)
scanned=$(value compact_migrate_scanned /proc/vmstat)
check "GFP_KERNEL gets blocks" put 1 "$ALLOC/$WHO/alloc"
check "the scanners ran" grew compact_migrate_scanned /proc/vmstat "$scanned"
check "the DPU did not" same dpu_compact_regions /proc/vmstat "$regions"
check "the process still finds every byte" reads ok "$MM/$PROCESS/verify"

echo "# In the background"
put 1 $VM/dpu_compact_enabled
put 1 "$ALLOC/$WHO/free"
put '20 seed=3' "$MM/$PROCESS/holes"
drain
put 20 $VM/compaction_proactiveness
check "an idle fragmented machine compacts, and files stay readable" compacts_by_itself
check "the process finds every byte again" reads ok "$MM/$PROCESS/verify"

echo "# Watermarks and caches"
check "min_free_kbytes can be set" accepts 65536 $VM/min_free_kbytes
check "drop_caches takes 3" put 3 $VM/drop_caches
check "and logs it" logged 'echo \([0-9]+\): drop_caches: 3'
check "drop_caches refuses 5" fails 'Invalid argument' 5 $VM/drop_caches

check "rmdir gives the blocks back" rmdir "$ALLOC/$WHO"
check "so does the other one's" rmdir "$DRAIN"
check "rmdir ends the process" rmdir "$MM/$PROCESS"

finish
