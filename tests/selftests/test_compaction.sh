#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
# Traditional compaction from user space: fragment, compact everything or one node, read what became of free memory.
#
# Run as root over an emulated kernel: dpud exec -- sh tests/selftests/test_compaction.sh
# TAP 13 on stdout; exit code 0 passed, 1 failed, 4 skipped (kselftest). Everything is put back at the end.

. "$(dirname "$0")/tap_helpers.sh"

VM=/proc/sys/vm
NODES=/sys/devices/system/node
MM=/sys/kernel/config/kernelsim/mm
EXTFRAG=/sys/kernel/debug/extfrag
PROCESS=selftest-$$
CHILD=$PROCESS-child
OTHER=$PROCESS-other

# refused ERROR COMMAND...: it refused with that error.
refused() {
    error=$1
    shift
    message=$("$@" 2>&1) && return 1
    case $message in *": $error") ;; *) return 1 ;; esac
}

# refuses VALUE FILE: EINVAL, and the file reads as before.
refuses() {
    before=$(cat "$2")
    refused 'Invalid argument' put "$1" "$2" && [ "$(cat "$2")" = "$before" ]
}

# counter NAME: of /proc/vmstat.
counter() {
    sed -n "s/^$1 //p" /proc/vmstat
}

counters() {
    grep "^compact_$1" /proc/vmstat
}

# large_blocks [NODE]: free blocks of order 9 and 10.
large_blocks() {
    awk -v node="${1:-}" '
        node == "" || $2 == node "," { nr += $14 + 2 * $15 }
        END { print nr + 0 }' /proc/buddyinfo
}

# buddyinfo_of NODE
buddyinfo_of() {
    grep "^Node $1," /proc/buddyinfo
}

# unusable_by_hand ORDER: of each zone, from buddyinfo, in thousandths.
unusable_by_hand() {
    awk -v order="$1" '{
        free = usable = 0
        for (o = 0; o <= 10; o++) {
            free += $(5 + o) * 2 ^ o
            if (o >= order) usable += $(5 + o) * 2 ^ o
        }
        print free ? int((free - usable) * 1000 / free) : 1000
    }' /proc/buddyinfo
}

# unusable ORDER: what the file says, in thousandths.
unusable() {
    awk -v field=$((5 + $1)) '{ sub(/\./, "", $field); print $field + 0 }' $EXTFRAG/unusable_index
}

same_index() {
    [ "$(unusable "$1")" = "$(unusable_by_hand "$1")" ]
}

# A free block is there exactly where the index is -1.000.
index_tells_of_blocks() {
    awk -v field=$((5 + $1)) '{ print ($field == "-1.000") }' $EXTFRAG/extfrag_index >"$scratch/index"
    awk -v order="$1" '{
        nr = 0
        for (o = order; o <= 10; o++) nr += $(5 + o)
        print (nr > 0)
    }' /proc/buddyinfo >"$scratch/blocks"
    cmp -s "$scratch/index" "$scratch/blocks"
}

put_back() {
    put "$unevictable" $VM/compact_unevictable_allowed
    put "$proactiveness" $VM/compaction_proactiveness
    for name in "$CHILD" "$OTHER" "$PROCESS"; do
        [ ! -d "$MM/$name" ] || rmdir "$MM/$name"
    done
    rm -rf "$scratch"
}

echo "TAP version 13"
for file in $VM/compact_memory $NODES/node0/compact $EXTFRAG/unusable_index $MM; do
    [ -e "$file" ] || skip "there is no $file"
done
[ -w $VM/extfrag_threshold ] || skip "$VM/extfrag_threshold cannot be written by uid $(id -u)"

unevictable=$(cat $VM/compact_unevictable_allowed)
proactiveness=$(cat $VM/compaction_proactiveness)
scratch=$(mktemp -d)
trap put_back EXIT
trap 'exit $KSFT_FAIL' HUP INT TERM

echo "# The knobs"
check "compaction_proactiveness refuses 101" refuses 101 $VM/compaction_proactiveness
check "compaction_proactiveness takes 0, so that nothing is compacted unasked" accepts 0 $VM/compaction_proactiveness
for value in -1 1001 abc; do
    check "extfrag_threshold refuses $value" refuses $value $VM/extfrag_threshold
done
check "compact_unevictable_allowed refuses 2" refuses 2 $VM/compact_unevictable_allowed
check "defrag_mode refuses 2" refuses 2 $VM/defrag_mode
for value in 0 2 -1 +1 abc ' '; do
    check "compact_memory refuses '$value'" refused 'Invalid argument' put "$value" $VM/compact_memory
done
check "compact_memory cannot be read" refused 'Permission denied' cat $VM/compact_memory
check "node0/compact cannot be read" refused 'Permission denied' cat $NODES/node0/compact

echo "# Everything"
check "mkdir starts a process" mkdir "$MM/$PROCESS"
check "it gets 1 GiB" accepts 1073741824 "$MM/$PROCESS/anon"
check "it gives a random half back" put '50 seed=1' "$MM/$PROCESS/holes"
check "its fork shares the rest" put "$CHILD" "$MM/$PROCESS/fork"
before=$(large_blocks)
success=$(counter pgmigrate_success)
isolated=$(counter compact_isolated)
migrate_scanned=$(counter compact_migrate_scanned)
free_scanned=$(counter compact_free_scanned)
others=$(counters '\(stall\|fail\|success\|daemon_.*\) ')
show "buddyinfo" cat /proc/buddyinfo
check "unusable_index of order 9 is what buddyinfo says" same_index 9
check "unusable_index of order 4 is what buddyinfo says" same_index 4
check "extfrag_index is -1.000 where a block of order 10 is free" index_tells_of_blocks 10
check "compact_memory takes 1" put 1 $VM/compact_memory
show "buddyinfo" cat /proc/buddyinfo
after=$(large_blocks)
echo "# $before pages of 2 MiB were free, $after are now"
check "two thirds of the holes became pages of 2 MiB" [ $((after - before)) -ge $((256 * 2 / 3)) ]
moved=$(($(counter pgmigrate_success) - success))
echo "# $moved pages moved"
check "pages moved" [ "$moved" -gt 0 ]
check "they and their targets were isolated" [ $(($(counter compact_isolated) - isolated)) -ge $((2 * moved)) ]
check "the migrate scanner looked at more" [ $(($(counter compact_migrate_scanned) - migrate_scanned)) -ge "$moved" ]
check "so did the free scanner" [ $(($(counter compact_free_scanned) - free_scanned)) -ge "$moved" ]
check "no other counter of compaction moved" [ "$(counters '\(stall\|fail\|success\|daemon_.*\) ')" = "$others" ]
check "unusable_index is still what buddyinfo says" same_index 9
check "extfrag_index too" index_tells_of_blocks 10
check "the process finds every byte" reads ok "$MM/$PROCESS/verify"
check "and so does its child" reads ok "$MM/$CHILD/verify"

echo "# Locked memory"
check "rmdir ends the child" rmdir "$MM/$CHILD"
put '25 seed=2' "$MM/$PROCESS/holes"
check "all of it is locked" accepts 100 "$MM/$PROCESS/mlock"
put 0 $VM/compact_unevictable_allowed
success=$(counter pgmigrate_success)
put 1 $VM/compact_memory
check "it stays where unevictable pages must" [ "$(counter pgmigrate_success)" -eq "$success" ]
put 1 $VM/compact_unevictable_allowed
put 1 $VM/compact_memory
check "it moves where they may" [ "$(counter pgmigrate_success)" -gt "$success" ]
check "and is still there, every byte" reads ok "$MM/$PROCESS/verify"

echo "# One node"
if [ -e $NODES/node1/compact ]; then
    mkdir "$MM/$OTHER"
    put 1 "$MM/$OTHER/node"
    put 536870912 "$MM/$OTHER/anon"
    put '50 seed=3' "$MM/$OTHER/holes"
    put '25 seed=4' "$MM/$PROCESS/holes"
    node0=$(buddyinfo_of 0)
    before=$(large_blocks 1)
    check "node1/compact takes any text" put 'at once' $NODES/node1/compact
    check "node 1 has more pages of 2 MiB" [ "$(large_blocks 1)" -gt "$before" ]
    check "node 0 is as it was" [ "$(buddyinfo_of 0)" = "$node0" ]
    check "every byte is still there" reads ok "$MM/$OTHER/verify"
    check "rmdir ends the process of node 1" rmdir "$MM/$OTHER"
fi
check "rmdir ends the process" rmdir "$MM/$PROCESS"

finish
