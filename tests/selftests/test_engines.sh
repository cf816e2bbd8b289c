#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
# Engines from user space: choose each one, compact with it, read every byte back, read what it took.
#
# Run as root over an emulated kernel: dpud exec -- sh tests/selftests/test_engines.sh
# TAP 13 on stdout; exit code 0 passed, 1 failed, 4 skipped (kselftest). Everything is put back at the end.

. "$(dirname "$0")/tap_helpers.sh"

VM=/proc/sys/vm
NODES=/sys/devices/system/node
MM=/sys/kernel/config/kernelsim/mm
DEBUG=/sys/kernel/debug/dpu_compact
PROCESS=selftest-$$

chosen() {
    sed 's/.*\[\(.*\)\].*/\1/' $DEBUG/engine
}

refuses() {
    before=$(cat "$3")
    message=$(put "$2" "$3" 2>&1) && return 1
    case $message in *": $1") ;; *) return 1 ;; esac
    [ "$(cat "$3")" = "$before" ]
}

stat_of() {
    sed -n "s/^$1 //p" $DEBUG/stats
}

# moved: pages by all engines so far.
moved() {
    echo $(($(stat_of pages_moved) + $(stat_of cpu_pages_moved)))
}

compact_all_nodes() {
    for node in "$NODES"/node*/compact_dpu; do
        put 1 "$node" || return
    done
}

# measured FILE ENGINE WHAT: the table has that row, with values that rise from p50 to the maximum.
measured() {
    awk -v engine="$2" -v what="$3" '
        $1 == engine && $2 == what { found = $3 > 0 && $4 <= $5 && $5 <= $6 && $6 <= $7 }
        END { exit !found }' "$DEBUG/$1"
}

listed() {
    awk -v engine="$1" '$4 == engine { found = 1 } END { exit !found }' $DEBUG/regions
}

put_back() {
    put "$engine" $DEBUG/engine
    put "$adaptive" $VM/dpu_compact_adaptive
    put "$region_order" $VM/dpu_compact_region_order
    [ ! -d "$MM/$PROCESS" ] || rmdir "$MM/$PROCESS"
}

echo "TAP version 13"
for file in $DEBUG/engine $NODES/node0/compact_dpu $MM; do
    [ -e "$file" ] || skip "there is no $file"
done
[ -w $DEBUG/engine ] || skip "$DEBUG/engine cannot be written by uid $(id -u)"

engine=$(chosen)
adaptive=$(cat $VM/dpu_compact_adaptive)
region_order=$(cat $VM/dpu_compact_region_order)
trap put_back EXIT
trap 'exit $KSFT_FAIL' HUP INT TERM

put 15 $VM/dpu_compact_region_order
mkdir "$MM/$PROCESS"
put 256M "$MM/$PROCESS/anon"

check "an engine that there is not is refused" refuses 'Invalid argument' abacus $DEBUG/engine
seed=0
for name in $(tr -d '[]' <$DEBUG/engine); do
    seed=$((seed + 1))
    check "engine takes $name" put "$name" $DEBUG/engine
    check "it shows $name" [ "$(chosen)" = "$name" ]
    put "20 seed=$seed" "$MM/$PROCESS/holes"
    before=$(moved)
    check "compact_dpu of every node with $name" compact_all_nodes
    check "$name moved pages" [ "$(moved)" -gt "$before" ]
    check "the process finds every byte after $name" reads ok "$MM/$PROCESS/verify"
    check "the regions of $name are listed" listed "$name"
    check "what they took is known" measured latency "$name" modelled
    check "and how long pages were unavailable" measured unavailable "$name" modelled
    check "and how many went together" measured batch_size "$name" pages
done
sed 's/^/#   /' $DEBUG/latency

check "dpu_compact_adaptive refuses 2" refuses 'Invalid argument' 2 $VM/dpu_compact_adaptive
check "dpu_compact_adaptive takes 1" put 1 $VM/dpu_compact_adaptive
put ideal $DEBUG/engine
put 9 $VM/dpu_compact_region_order
put '50 seed=99' "$MM/$PROCESS/holes"
check "compact_dpu chooses by itself" compact_all_nodes
check "it found an engine without copy time to be faster" [ "$(stat_of breakeven_pages)" -gt 0 ]
check "and used it" [ "$(stat_of adaptive_dpu)" -gt "$(stat_of adaptive_cpu)" ]
check "the process still finds every byte" reads ok "$MM/$PROCESS/verify"
check "rmdir ends the process" rmdir "$MM/$PROCESS"

finish
