#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
# Faults of the DPU and of the pages in its batches, injected through debugfs with echo, cat and dmesg alone.
#
# Run as root over an emulated kernel: dpud exec -- sh tests/selftests/test_faults.sh
# TAP 13 on stdout; exit code 0 passed, 1 failed, 4 skipped (kselftest). Everything is put back at the end.

. "$(dirname "$0")/tap_helpers.sh"

VM=/proc/sys/vm
NODES=/sys/devices/system/node
MM=/sys/kernel/config/kernelsim/mm
DEBUGFS=/sys/kernel/debug/dpu_compact
PROCESS=faults-$$

seed=0

# refuses VALUE FILE: EINVAL, and the file reads as before.
refuses() {
    before=$(cat "$2")
    message=$(put "$1" "$2" 2>&1) && return 1
    case $message in *': Invalid argument') ;; *) return 1 ;; esac
    [ "$(cat "$2")" = "$before" ]
}

stat_of() {
    while read -r name value; do
        [ "$name" != "$1" ] || echo "$value"
    done <"$DEBUGFS/stats"
}

# nr_logged TEXT: how many records of the kernel log have it.
nr_logged() {
    nr_found=0
    dmesg >"$LOG"
    while read -r line; do
        case $line in *"$1"*) nr_found=$((nr_found + 1)) ;; esac
    done <"$LOG"
    echo $nr_found
}

# The reason of the last failed batch.
last_reason() {
    last=none
    while read -r _ reason _; do
        last=$reason
    done <$DEBUGFS/last_failures
    echo "$last"
}

# run: fragment anew, and compact both nodes.
run() {
    seed=$((seed + 1))
    put 64M "$MM/$PROCESS/anon"
    put "50 seed=$seed" "$MM/$PROCESS/holes"
    for node in "$NODES"/node*/compact_dpu; do
        put 1 "$node" || return
    done
}

# disarm KIND
disarm() {
    put 0 "$DEBUGFS/fail_$1/probability"
    put 0 "$DEBUGFS/fail_$1/nth"
    put 1 "$DEBUGFS/fail_$1/times"
    put 0 "$DEBUGFS/fail_$1/move"
}

all_well() {
    reads ok "$MM/$PROCESS/verify" && [ "$(stat_of layout_mismatches)" = 0 ] && [ "$(stat_of regions_in_flight)" = 0 ]
}

put_back() {
    for kind in $DEVICE_KINDS $PAGE_KINDS; do
        disarm "$kind"
    done
    put 1 $DEBUGFS/revive
    put "$min_fragments" $VM/dpu_compact_min_fragments
    [ ! -d "$MM/$PROCESS" ] || rmdir "$MM/$PROCESS"
    rm -f "$LOG"
}

# KIND=the reason that the kernel counts it under
DEVICE_KINDS="dpu_fault timeout partial corrupt lost_completion rank_lost"
PAGE_KINDS="page_busy page_pinned page_dirtied page_freed page_forked"
reason_of() {
    case $1 in
    partial) echo internal ;;
    corrupt) echo corrupted_memory ;;
    lost_completion) echo timeout ;;
    rank_lost) echo driver ;;
    *) echo "$1" ;;
    esac
}

echo "TAP version 13"
for file in $DEBUGFS/fail_dpu_fault/nth $DEBUGFS/fail_page_busy/nth $NODES/node0/compact_dpu $MM; do
    [ -e "$file" ] || skip "there is no $file"
done
[ -w $DEBUGFS/fail_dpu_fault/nth ] || skip "$DEBUGFS cannot be written by uid $(id -u)"

LOG=$(mktemp) || skip "no temporary file"
min_fragments=$(cat $VM/dpu_compact_min_fragments)
trap put_back EXIT
trap 'exit $KSFT_FAIL' HUP INT TERM
put 16 $VM/dpu_compact_min_fragments
mkdir "$MM/$PROCESS"

echo "# The knobs"
for kind in $DEVICE_KINDS $PAGE_KINDS; do
    point=$DEBUGFS/fail_$kind
    check "fail_$kind is off" reads 0 "$point/probability"
    check "fail_$kind refuses a probability of 101" refuses 101 "$point/probability"
    check "fail_$kind refuses times -2" refuses -2 "$point/times"
done

echo "# The device, once"
for kind in $DEVICE_KINDS; do
    point=$DEBUGFS/fail_$kind
    reason=$(reason_of "$kind")
    failed=$(stat_of "failed_$reason")
    by_cpu=$(stat_of cpu_pages_moved)
    forced=$(nr_logged "name fail_$kind,")
    put 10 "$point/move"
    put 1 "$point/nth"
    check "a compaction with $kind ends" run
    check "$kind struck once" reads 0 "$point/nth"
    check "it is counted under $reason" [ "$(stat_of "failed_$reason")" -eq $((failed + 1)) ]
    check "it is in the log" [ "$(nr_logged "name fail_$kind,")" -eq $((forced + 1)) ]
    check "no byte is wrong after $kind" all_well
    [ "$kind" = lost_completion ] || check "the CPU finished it" [ "$(stat_of cpu_pages_moved)" -gt "$by_cpu" ]
    [ "$kind" != rank_lost ] || put 1 $DEBUGFS/revive
    disarm "$kind"
done
check "last_failures ends with the last of them" [ "$(last_reason)" = driver ]

echo "# By chance"
before=$(cat $DEBUGFS/fail_corrupt/injected)
put 7 $DEBUGFS/fail_corrupt/seed
put -1 $DEBUGFS/fail_corrupt/times
put 30 $DEBUGFS/fail_corrupt/probability
check "a compaction with some corruption ends" run
check "some batches were hit" [ "$(cat $DEBUGFS/fail_corrupt/injected)" -gt "$before" ]
check "no byte is wrong after it" all_well
disarm corrupt

echo "# Pages in mid-batch"
for kind in $PAGE_KINDS; do
    point=$DEBUGFS/fail_$kind
    said=$(nr_logged "fail_$kind: page at")
    before=$(cat "$point/injected")
    put 2 "$point/move"
    put 100 "$point/probability"
    put -1 "$point/times"
    check "a compaction with $kind ends" run
    check "$kind struck" [ "$(cat "$point/injected")" -gt "$before" ]
    check "it is in the log" [ "$(nr_logged "fail_$kind: page at")" -gt "$said" ]
    check "no byte is wrong after $kind" all_well
    disarm "$kind"
done

echo "# Everything at once"
for kind in dpu_fault timeout partial corrupt lost_completion $PAGE_KINDS; do
    put 20 "$DEBUGFS/fail_$kind/probability"
    put -1 "$DEBUGFS/fail_$kind/times"
done
for round in 1 2 3; do
    check "round $round ends" run
    check "no byte is wrong in round $round" all_well
done

check "rmdir ends the process" rmdir "$MM/$PROCESS"
finish
