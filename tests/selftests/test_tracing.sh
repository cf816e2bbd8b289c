#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
# Tracing from user space: the two recipes of the design as they stand there, then what the control files promise.
#
# Run as root over an emulated kernel: dpud exec -- sh tests/selftests/test_tracing.sh
# TAP 13 on stdout; exit code 0 passed, 1 failed, 4 skipped (kselftest). Everything is put back at the end.

. "$(dirname "$0")/tap_helpers.sh"

DEBUG=/sys/kernel/debug
TRACING=$DEBUG/tracing
MM=/sys/kernel/config/kernelsim/mm
NODE=/sys/devices/system/node/node0
CONTROL=$DEBUG/dynamic_debug/control
PROCESS=selftest-$$
OUTPUT=${TMPDIR:-/tmp}/test_tracing.$$

put_back() {
    echo nop >current_tracer
    echo >set_event
    echo >set_ftrace_filter
    echo 1 >tracing_on
    echo >trace
    echo '=_' >$CONTROL
    cd /
    [ ! -d "$MM/$PROCESS" ] || rmdir "$MM/$PROCESS"
    rm -f "$OUTPUT"
}

# fragment SEED: give a random half of the process's pages back.
fragment() {
    put 64M "$MM/$PROCESS/anon"
    put "50 seed=$1" "$MM/$PROCESS/holes"
}

# traced PATTERN: a line of the trace matches.
traced() {
    grep -Eq "$1" trace
}

not_traced() {
    ! traced "$1"
}

# piped PATTERN: so does a line of what the pipe gave.
piped() {
    grep -Eq "$1" "$OUTPUT"
}

entries() {
    sed -n 's,^# entries-in-buffer/entries-written: \([0-9]*\)/.*,\1,p' trace
}

# the_graph_is_whole: every block that is opened is closed.
the_graph_is_whole() {
    [ "$(grep -c '{$' trace)" -eq "$(grep -c '}$' trace)" ]
}

echo "TAP version 13"
[ -e $TRACING/current_tracer ] || skip "there is no $TRACING"
[ -e $NODE/compact_dpu ] || skip "there is no $NODE/compact_dpu"
cd $TRACING || skip "$TRACING cannot be entered"
trap put_back EXIT
trap 'exit $KSFT_FAIL' HUP INT TERM
mkdir "$MM/$PROCESS"

echo "# Recipe 1: what does dpu_compact_execute spend its time on?"
fragment 1
check "cd" cd /sys/kernel/debug/tracing
check "compaction events" put 1 events/compaction/enable
check "function_graph" put function_graph current_tracer
check "of dpu_compact_execute" put dpu_compact_execute set_ftrace_filter
check "compact" put 1 /sys/devices/system/node/node0/compact_dpu
show "trace" head -n 24 trace
check "it is named as the tracer" traced '^# tracer: function_graph$'
check "dpu_compact_execute was called" traced '\|  dpu_compact_execute\(\) \{$'
check "its callees took time" traced '^ [0-9]+\) ..[0-9.]+ us +\|    dpu_hw_(compact_execute|submit)\(\);$'
check "and so did it" traced '^ [0-9]+\) ..[0-9.]+ us +\|  \}$'
check "nothing else is a root" not_traced '\|  dpu_compact_update_mappings'
check "the graph is whole" the_graph_is_whole
check "set_ftrace_filter reads back" reads dpu_compact_execute set_ftrace_filter
put nofuncgraph-callees trace_options
: >trace
fragment 2
put 1 $NODE/compact_dpu
check "nofuncgraph-callees: just the function, as Linux has it" traced '[0-9.]+ us +\|  dpu_compact_execute\(\);$'
put funcgraph-callees trace_options

echo "# Recipe 2: follow it"
: >trace
fragment 3
check "compaction events" put 1 events/compaction/enable
check "function" put function current_tracer
check "of dpu_compact_*" put 'dpu_compact_*' set_ftrace_filter
timeout 60 cat trace_pipe >"$OUTPUT" &
reader=$!
put 1 $NODE/compact_dpu
put 1 $NODE/compact
put done trace_marker
until grep -q 'tracing_mark_write: done' "$OUTPUT" || ! kill -0 $reader 2>/dev/null; do sleep 0.1; done
kill $reader 2>/dev/null
wait $reader 2>/dev/null
show "trace_pipe" head -n 12 "$OUTPUT"
check "functions and their callers" piped ' [0-9]+\.[0-9]{6}: dpu_compact_region_create <-dpu_compact_zone$'
check "events among them" piped ': mm_compaction_begin: zone_start=0x[0-9a-f]+ .* mode=sync$'
check "no other function" sh -c "! grep -q ' <-' $OUTPUT || ! grep ' <-' $OUTPUT | grep -qv ': dpu_compact_'"
check "what was read is gone" [ "$(entries)" = 0 ]

echo "# Events"
put nop current_tracer
: >set_event
check "nothing is on" reads 0 events/enable
put 1 events/compaction/mm_compaction_begin/enable
check "X where some are" reads X events/compaction/enable
check "set_event lists them" reads compaction:mm_compaction_begin set_event
check "set_event adds" sh -c "echo 'compaction:mm_compaction_finished' >>set_event"
check "and takes away" sh -c "echo '!compaction:mm_compaction_begin' >>set_event"
check "set_event reads back" reads compaction:mm_compaction_finished set_event
check "an unknown event" fails 'Invalid argument' compaction:nothing set_event
check "enable takes no 2" fails 'Invalid argument' 2 events/enable
put 1 events/compaction/mm_compaction_finished/enable
put 'ret == 5' events/compaction/mm_compaction_finished/filter
: >trace
put 1 $NODE/compact
check "a filter lets through" traced 'mm_compaction_finished: .* ret=complete$'
check "and keeps out" not_traced 'ret=continue'
check "a wrong filter" fails 'Invalid argument' 'nothing == 1' events/compaction/mm_compaction_finished/filter
check "is explained" grep -q 'parse_error: Field not found' events/compaction/mm_compaction_finished/filter
check "also in error_log" grep -q 'event filter parse error: error: Field not found' error_log
put 0 events/compaction/mm_compaction_finished/filter
put 1 events/kmem/mm_page_free/enable
: >trace
put 25 "$MM/$PROCESS/holes"
check "pages that are freed" traced 'mm_page_free: page=[0-9a-f]{16} pfn=0x[0-9a-f]+ order=0$'
check "by this shell's child" traced "^ +echo-[0-9]+ .*mm_page_free"
put 0 events/enable

echo "# The rest"
check "no such tracer" fails 'Invalid argument' nothing current_tracer
check "no such function" fails 'Invalid argument' nothing set_ftrace_filter
put 0 tracing_on
: >trace
check "a marker needs tracing" fails 'Bad file descriptor' hello trace_marker
put 1 tracing_on
put hello trace_marker
check "a marker" traced ': tracing_mark_write: hello$'
check "reading leaves it there" traced ': tracing_mark_write: hello$'
check "an empty pipe does not block who will not wait" \
    sh -c ": >trace; dd if=trace_pipe iflag=nonblock 2>&1 | grep -q 'Resource temporarily unavailable'"
check "buffer_size_kb" accepts 256 buffer_size_kb
put 1408 buffer_size_kb

echo "# Dynamic debug"
check "file dpu_compact.c +p" put 'file dpu_compact.c +p' $CONTROL
check "sites are on" grep -q '^mm/dpu_compact.c:[0-9]* \[dpu_compact\]dpu_compact_layout =p "' $CONTROL
fragment 4
put 1 $NODE/compact_dpu
check "and speak" logged 'region 0x[0-9a-f]+: [0-9]+ skip runs among [0-9]+ fragments'
check "with a prefix" put 'func dpu_compact_layout +mfl' $CONTROL
fragment 5
put 1 $NODE/compact_dpu
check "if asked" logged 'dpu_compact:dpu_compact_layout:[0-9]+: region .*'
check "a wrong command" fails 'Invalid argument' 'file dpu_compact.c' $CONTROL

check "the process finds every byte" reads ok "$MM/$PROCESS/verify"

finish
