#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
# Sixteen shells at once on one kernel: each echoes and cats for some seconds. No error but those that the kernel has
# for it, every byte still there, and the free lists add up afterwards.
#
# Run as root over an emulated kernel: dpud exec -- sh tests/selftests/test_concurrency.sh [SECONDS]
# TAP 13 on stdout; exit code 0 passed, 1 failed, 4 skipped (kselftest). Everything is put back at the end.

. "$(dirname "$0")/tap_helpers.sh"

VM=/proc/sys/vm
NODES=/sys/devices/system/node
MM=/sys/kernel/config/kernelsim/mm
STATS=/sys/kernel/debug/dpu_compact/stats
SECONDS_LONG=${1:-5}

echo "TAP version 13"
if ! [ -e $VM/dpu_compact_enabled ] || ! [ -d $MM ]; then
    echo "1..0 # SKIP no DPU compaction in this kernel; run me under dpud exec"
    exit $KSFT_SKIP
fi

scratch=$(mktemp -d)
put_back() {
    rm -rf "$scratch"
    echo "$min_fragments" >$VM/dpu_compact_min_fragments
    echo "$region_order" >$VM/dpu_compact_region_order
    echo 0 >$VM/nr_hugepages
}
min_fragments=$(cat $VM/dpu_compact_min_fragments)
region_order=$(cat $VM/dpu_compact_region_order)
trap put_back EXIT
trap 'exit $KSFT_FAIL' HUP INT TERM

# Each shell repeats one of these, with its own number as $1 and the round as $2. What it may print on stderr is in
# `expected` below; each line of stdout is a complaint.

compactor() { # $1 of 4: two DPU, one Linux on a node, one on all
    case $1 in
    0) put 1 $NODES/node0/compact_dpu ;;
    1) put 1 $NODES/node1/compact_dpu ;;
    2) put 1 $NODES/node0/compact ;;
    3) put 1 $VM/compact_memory ;;
    esac
}

tuner() {
    put $((9 + $2 % 10)) $VM/dpu_compact_region_order
    put $((1 + $2 % 64)) $VM/dpu_compact_min_fragments
    order=$(cat $VM/dpu_compact_region_order)
    [ "$order" -ge 9 ] && [ "$order" -le 18 ] || echo "region_order reads $order"
    put 99 $VM/dpu_compact_region_order # EINVAL
}

free_lists() {
    [ "$(grep -c '^Node [01], zone ' /proc/buddyinfo)" -eq 3 ] || echo "buddyinfo is cut short"
    awk 'NF != 15 { print "buddyinfo:", $0 }' /proc/buddyinfo
    grep -q '^nr_free_pages ' /proc/vmstat || echo "vmstat has no nr_free_pages"
    grep -q '^pages_moved ' $STATS || echo "stats has no pages_moved"
}

comer_and_goer() {
    mkdir $MM/passer-"$1" || return
    put 8M $MM/passer-"$1"/anon
    put "50 seed=$2" $MM/passer-"$1"/holes
    put "passer-$1-child" $MM/passer-"$1"/fork
    [ "$(cat $MM/passer-"$1"-child/verify)" = ok ] || echo "the child of passer-$1 misses bytes"
    rmdir $MM/passer-"$1"-child
    [ "$(cat $MM/passer-"$1"/verify)" = ok ] || echo "passer-$1 misses bytes"
    rmdir $MM/passer-"$1"
}

rival() { # two of them want the same name
    mkdir $MM/rival
    put 4M $MM/rival/anon
    put "30 seed=$2" $MM/rival/touch
    rmdir $MM/rival
}

reader() {
    [ "$(cat $MM/stayer/verify)" = ok ] || echo "the stayer misses bytes"
}

writer() {
    put "20 seed=$2" $MM/stayer/touch
    put "10 seed=$2" $MM/stayer/holes
}

log_reader() {
    dmesg | tail -n 1 | grep -q . || echo "dmesg is empty"
}

pool() {
    put $(($2 % 8)) $VM/nr_hugepages
    [ "$(cat $VM/nr_hugepages)" -le 8 ] || echo "more huge pages than asked for"
}

# What the kernel answers where another shell was faster, or there is nothing to be had.
expected='File exists|No such file or directory|Directory nonexistent|No such device|No such process|Invalid argument|Cannot allocate memory'

# shell ROLE NUMBER: rounds of one role until time is up.
shell() {
    round=0
    while [ "$(date +%s)" -lt "$end" ]; do
        round=$((round + 1))
        $1 "$2" "$round"
    done >"$scratch/$1-$2.out" 2>"$scratch/$1-$2.err"
    echo "$round" >"$scratch/$1-$2.rounds"
}

answers() { # does the file system answer at all, after all this?
    cat /proc/buddyinfo >/dev/null
}

no_complaints() {
    cat "$scratch"/*.out | sed 's/^/# /' | head -n 20
    [ -z "$(cat "$scratch"/*.out)" ]
}

no_other_errors() {
    cat "$scratch"/*.err | grep -Ev "$expected" | sort | uniq -c | sed 's/^/# /' | head -n 20
    [ -z "$(cat "$scratch"/*.err | grep -Ev "$expected")" ]
}

all_got_on() {
    for file in "$scratch"/*.rounds; do
        echo "# $(basename "$file" .rounds): $(cat "$file") rounds"
    done
    ! grep -qx 0 "$scratch"/*.rounds
}

adds_up() {
    buddy=$(awk '{ for (o = 0; o < 11; o++) free += $(5 + o) * 2 ^ o } END { printf "%d", free }' /proc/buddyinfo)
    counted=$(sed -n 's/^nr_free_pages //p' /proc/vmstat)
    echo "# free pages: $buddy in buddyinfo, $counted in vmstat, $at_rest before"
    [ "$buddy" -eq "$counted" ] && [ "$buddy" -eq "$at_rest" ]
}

nothing_broken() {
    ! dmesg | grep -E 'BUG|layout'
}

all_gone() {
    [ "$(ls $MM)" = "" ]
}

# The page tables of a process stay until it ends, so the figure before is taken without any.
at_rest=$(sed -n 's/^nr_free_pages //p' /proc/vmstat)

check "a process that stays" mkdir $MM/stayer
echo 64M >$MM/stayer/anon

end=$(($(date +%s) + SECONDS_LONG))
for number in 0 1 2 3; do shell compactor $number & done
for number in 0 1; do
    shell free_lists $number &
    shell comer_and_goer $number &
    shell rival $number &
done
for role in tuner reader writer log_reader pool; do shell $role 0 & done
shell free_lists 2 &
wait
nr_shells=$(ls "$scratch" | grep -c rounds)

check "sixteen shells came to their end" [ "$nr_shells" -eq 16 ]
check "each of them got on" all_got_on
check "none read anything wrong" no_complaints
check "no error but those of a kernel" no_other_errors
check "the files still answer" answers
check "the stayer finds every byte" [ "$(cat $MM/stayer/verify)" = ok ]
check "no batch is under way any more" [ "$(sed -n 's/^regions_in_flight //p' $STATS)" -eq 0 ]
check "the DPU moved pages" [ "$(sed -n 's/^pages_moved //p' $STATS)" -gt 0 ]
check "nothing is broken by the log" nothing_broken
for name in stayer rival; do
    [ -d $MM/$name ] && rmdir $MM/$name
done
echo 0 >$VM/nr_hugepages
check "all processes have gone" all_gone
check "every page is free again, and counted" adds_up

finish
