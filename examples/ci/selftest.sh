#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
# Stands for your own selftest: does the tool under test get huge pages out of fragmented memory?
#
#     dpud exec -- sh selftest.sh
#
# TAP on stdout; exit code 0 passed, 1 failed, 4 skipped, as kselftest has it.
set -u

compact=/sys/devices/system/node/node0/compact_dpu
mm=/sys/kernel/config/kernelsim/mm
alloc=/sys/kernel/config/kernelsim/alloc
status=0

result() {
    if [ "$1" -eq 0 ]; then echo "ok $2"; else echo "not ok $2"; status=1; fi
}

echo "TAP version 13"
if [ ! -e $compact ]; then
    echo "1..0 # SKIP this kernel has no DPU compaction"
    exit 4
fi
echo "1..3"
echo 0 >/proc/sys/vm/compaction_proactiveness
echo 18 >/proc/sys/vm/dpu_compact_region_order

mkdir $mm/web && echo 512M >$mm/web/anon && echo '50 seed=7' >$mm/web/holes
result $? "1 - memory is fragmented"

mkdir $alloc/huge && echo 9 >$alloc/huge/order && echo GFP_TRANSHUGE_LIGHT >$alloc/huge/gfp
echo 10000 >$alloc/huge/count && echo 1 >$alloc/huge/alloc
before=$(cat $alloc/huge/allocated)
echo 1 >$alloc/huge/free
# Here your tool would do its work, by the same file.
echo 1 >$compact
echo 1 >$alloc/huge/alloc
[ "$(cat $alloc/huge/allocated)" -gt "$before" ]
result $? "2 - compaction gained huge pages"

[ "$(cat $mm/web/verify)" = ok ]
result $? "3 - no byte was lost"
exit $status
