# SPDX-License-Identifier: GPL-2.0-only
# What every selftest in shell begins with: TAP results, and commands that are tests of a file. To be sourced.

set -u
export LC_ALL=C

KSFT_FAIL=1
KSFT_SKIP=4

nr_tests=0
nr_failed=0

# check DESCRIPTION COMMAND...: one test; it passes if the command does.
check() {
    description=$1
    shift
    nr_tests=$((nr_tests + 1))
    if "$@"; then
        echo "ok $nr_tests $description"
    else
        echo "not ok $nr_tests $description"
        nr_failed=$((nr_failed + 1))
    fi
}

# put VALUE FILE. The echo of coreutils, because that of dash does not say which error it was.
put() {
    env echo "$1" >"$2"
}

# reads TEXT FILE: that is what the file holds.
reads() {
    [ "$(cat "$2")" = "$1" ]
}

# skip WHY: nothing can be tested here.
skip() {
    echo "1..0 # SKIP $1"
    exit $KSFT_SKIP
}

# show TITLE COMMAND...: what it prints, as diagnostics.
show() {
    echo "# $1:"
    shift
    "$@" 2>&1 | sed 's/^/#   /'
}

# accepts VALUE FILE: the write succeeds, and the file reads as written.
accepts() {
    put "$1" "$2" && [ "$(cat "$2")" = "$1" ]
}

# fails ERROR VALUE FILE: the write fails with that error.
fails() {
    message=$(put "$2" "$3" 2>&1) && return 1
    case $message in *": $1") ;; *) return 1 ;; esac
}

# logged PATTERN: a record of the kernel log ends in it.
logged() {
    dmesg | grep -Eq "] $1\$"
}

# finish: the plan, and the exit code by kselftest's rules.
finish() {
    echo "1..$nr_tests"
    [ "$nr_failed" -eq 0 ] || exit $KSFT_FAIL
}
