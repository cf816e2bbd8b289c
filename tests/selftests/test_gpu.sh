#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
# A GPU's memory from outside: bytes go into a buffer with dd, pressure takes them off the device, sha256sum says that they
# come back. TAP output, exit code by kselftest's rules; to be run under `dpud exec`.

. "$(dirname "$0")/tap_helpers.sh"

CLASS=/sys/class/gpu_memvirt/gpu0
CLIENTS=/sys/kernel/config/gpu_memvirt/gpu0/clients

[ -d "$CLIENTS" ] || skip "no GPU memory virtualization here"
echo "TAP version 13"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# What a program keeps on a device: text, zeros, noise.
{
    cat /proc/config.gz /bin/sh
    head -c 1M /dev/zero
    head -c 5M /dev/urandom
} >"$work/data"
bytes=$(stat -c %s "$work/data")

counter() { # NAME FILE: the value of one of several counters
    sed -n "s/^$1 //p" "$2"
}

same() { # DATA: the buffer holds the file's bytes
    head -c "$bytes" "$1" | cmp -s - "$work/data"
}

mkdir "$CLIENTS/train" "$CLIENTS/train/buffers/weights"
buffer=$CLIENTS/train/buffers/weights

check "a new buffer has no memory" reads 0 "$buffer/size"
check "nothing can be written to it" fails "No space left on device" x "$buffer/data"
check "a size is memory" put 8M "$buffer/size"
check "st_size is the size" [ "$(stat -c %s "$buffer/data")" = 8388608 ]
check "its type is settled now" fails "Device or resource busy" managed "$buffer/type"
check "it reads as zeros" sh -c "[ \$(tr -d '\\0' <$buffer/data | wc -c) = 0 ]"
check "and takes no memory" [ "$(counter resident "$buffer/state")" = 0 ]

dd if="$work/data" of="$buffer/data" bs=1M 2>/dev/null
check "bytes come back from the device" same "$buffer/data"

evicted=$(counter evicted "$CLASS/address_space/stat")
check "pressure on the device" put 4M "$CLASS/memory/reclaim"
check "took pages off it" [ "$(counter evicted "$CLASS/address_space/stat")" -ge $((evicted + 1024)) ]
check "bytes come back from wherever they were" same "$buffer/data"

check "all of it leaves the device" sh -c "env echo $((bytes & ~4095)) >$buffer/reclaim"
sum=$(sha256sum <"$work/data")
check "sha256sum agrees" sh -c "[ \"\$(head -c $bytes $buffer/data | sha256sum)\" = \"$sum\" ]"
check "no more can go than there is" fails "Resource temporarily unavailable" 64M "$buffer/reclaim"

# Offsets.
printf 'GPU' | dd of="$buffer/data" bs=1 seek=4095 conv=notrunc 2>/dev/null
printf 'GPU' | dd of="$work/data" bs=1 seek=4095 conv=notrunc 2>/dev/null
check "a write across a page boundary, to a page that is off the device" same "$buffer/data"
check "a sparse write" sh -c "printf x | dd of=$buffer/data bs=1M seek=7 conv=notrunc 2>/dev/null"
check "beyond the end there is nothing" [ "$(dd if="$buffer/data" bs=1M skip=8 2>/dev/null | wc -c)" = 0 ]
check "and nothing can be written" sh -c "! printf x | dd of=$buffer/data bs=1M seek=8 conv=notrunc 2>/dev/null"

# Permissions.
check "read-only" accepts r-- "$buffer/permissions"
check "a write is refused" fails "Permission denied" x "$buffer/data"
check "the fault log says who, where and why" grep -q "client=train at=device0 va=0x.* access=w error=EACCES .*r--" \
    "$CLASS/address_space/faults"
check "no such letters" fails "Invalid argument" rz "$buffer/permissions"
check "the bytes are still there" same "$buffer/data"

# More than the device, which test_gpu.toml makes small.
put rw- "$buffer/permissions"
mkdir "$CLIENTS/train/buffers/large"
large=$CLIENTS/train/buffers/large
put 32M "$large/size"
for part in 0 8 16 24; do
    dd if="$work/data" of="$large/data" bs=1M seek=$part conv=notrunc 2>/dev/null
done
check "a buffer larger than the device is written" [ "$(counter untouched "$large/state")" -lt 2048 ]
check "some of it cannot be on the device" [ "$(counter stored "$large/state")" -gt 2048 ]
check "its last part is as it was written" sh -c "dd if=$large/data bs=1M skip=24 2>/dev/null | head -c $bytes | cmp -s - $work/data"
check "its first part too" same "$large/data"
check "the other buffer is as it was" same "$buffer/data"
check "every invariant holds" reads ok "$CLASS/address_space/verify"

rmdir "$large" "$buffer"
check "freed" reads 16777216 "$CLASS/memory/free_bytes"
check "the client ends" rmdir "$CLIENTS/train"
finish
