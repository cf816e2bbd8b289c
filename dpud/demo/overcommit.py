# SPDX-License-Identifier: GPL-2.0-only
"""The scene `dpud demo overcommit`: more GPU memory is promised than there is, and what happens when it runs out."""

from rich.console import Console

from dpud.demo.shell import Shell

FOLDER = "/sys/class/gpu_memvirt/gpu0/overcommit"
CLIENTS = "/sys/kernel/config/gpu_memvirt/gpu0/clients"


def play(console: Console) -> None:
    console.rule("More GPU memory than there is, and who gives way")
    shell = Shell(console)
    _promise(shell)
    _outrank(shell)
    _wait(shell)
    _feel(shell)


def _promise(shell: Shell) -> None:
    shell.say(
        "A simulated GPU of 256 MiB, with a pool of 512 MiB behind it. What can be promised is what can hold bytes: "
        "free memory and room in the pool, if nothing compresses. A batch job is granted 600 MiB, "
        "and writes 100 MiB of them."
    )
    shell.cd(FOLDER)
    shell.sh("cat supply headroom compressibility")
    shell.cd(CLIENTS)
    shell.sh("mkdir batch batch/buffers/b; env echo 600M > batch/buffers/b/size")
    shell.sh("head -c 100M /dev/urandom | dd of=batch/buffers/b/data bs=1M 2>/dev/null")
    shell.sh(f"cat {FOLDER}/clients; echo headroom $(cat {FOLDER}/headroom)")
    shell.say("Another client of the same priority asks for 400 MiB. That cannot be honoured, so it fails, and alone:")
    shell.sh("mkdir other other/buffers/b; env echo 400M > other/buffers/b/size || true")


def _outrank(shell: Shell) -> None:
    shell.say(
        "A service has priority 50. It is granted what the batch job was promised but has not written. What the batch "
        "job did write stays safe: its pages leave the device for the pool, before any of the service's do."
    )
    shell.sh("mkdir serve; echo 50 > serve/priority; mkdir serve/buffers/b; echo 400M > serve/buffers/b/size")
    shell.sh("head -c 200M /dev/urandom | dd of=serve/buffers/b/data bs=1M 2>/dev/null; sleep 1")
    shell.sh("for c in batch serve; do echo $c $(cat $c/resident_bytes) of $(cat $c/allocated_bytes); done")
    shell.say("When the batch job reads its bytes, they come back. The time that it waited for them is in `pressure`:")
    shell.sh("sha256sum < batch/buffers/b/data; cat batch/pressure")


def _wait(shell: Shell) -> None:
    shell.say(
        "Who has time may wait instead of failing. The other client allows 30 seconds; the queue shows it, and it is "
        "first in line when the batch job gives its memory back."
    )
    shell.sh("echo 30000 > other/queue_timeout_ms")
    shell.sh(
        f"(env echo 320M > other/buffers/b/size && echo granted) & sleep 1; cat {FOLDER}/queue; "
        "echo 0 > batch/buffers/b/size; wait"
    )
    shell.sh(f"cat {FOLDER}/stat")


def _feel(shell: Shell) -> None:
    shell.say("That was waiting for memory, too. `pressure` is as /proc/pressure/memory has it, for each client:")
    shell.sh("for c in batch other serve; do echo $c; cat $c/pressure; done")
    shell.say("What every client may rely on is docs/exhaustion.md; each of its sentences is a test.")
