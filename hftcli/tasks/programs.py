"""Running a program that a model wrote: in a process of its own that has no network, writes no files, and soon ends.

The kernel refuses what is not allowed (seccomp), so that no trick within Python helps: no sockets, no file opened for writing,
made, moved or removed, no other program, no signal to another process. Memory, time and open files are limited.
"""

import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from hftcli.errors import InputError

SECONDS = 10  # of the processor, and as many more of the clock
MEMORY_BYTES = 2 << 30

# Runs in the child, alone: it takes no more than the standard library, and its own text is the program on stdin.
GUARD = r"""
import ctypes, platform, resource, struct, sys
program = sys.stdin.read()
seconds, memory = int(sys.argv[1]), int(sys.argv[2])
for limit, value in (("CPU", seconds), ("AS", memory), ("FSIZE", 0), ("NOFILE", 16), ("CORE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + limit), (value, value))
machine, deny = platform.machine(), 0x00050001  # EPERM
# Numbers of x86_64 and aarch64: socket, socketpair, execve, execveat, fork, vfork, clone, clone3, kill, tkill, tgkill, ptrace,
# unlink, unlinkat, rename, renameat, renameat2, mkdir, mkdirat, rmdir, creat, link, linkat, symlink, symlinkat, chmod, fchmod,
# fchmodat, chown, lchown, fchownat, truncate, mknod, mknodat, setxattr, openat2, io_uring_setup, process_vm_writev,
# pidfd_send_signal, mount, umount2, setrlimit, prlimit64, bpf, utimensat.
tables = {
    "x86_64": (0xC000003E, 257, 2, [41, 53, 59, 322, 57, 58, 56, 62, 200, 234, 101, 87, 263, 82, 264, 316, 83, 258, 84, 85, 86,
        265, 88, 266, 90, 91, 268, 92, 94, 260, 76, 133, 259, 188, 437, 425, 311, 435, 424, 165, 166, 160, 302, 321, 280]),
    "aarch64": (0xC00000B7, 56, None, [198, 199, 221, 281, 220, 129, 130, 131, 117, 35, 38, 276, 34, 37, 36, 53, 54, 45, 33, 5,
        437, 425, 271, 435, 424, 40, 39, 164, 261, 280, 88]),
}
audit, openat, open_, numbers = tables[machine]
rules = [(0x20, 0, 0, 4), (0x15, 1, 0, audit), (6, 0, 0, 0x80000000), (0x20, 0, 0, 0)]
rules += [(0x35, 0, 1, 0x40000000), (6, 0, 0, deny)]  # no second table of calls
for number in numbers:
    rules += [(0x15, 0, 1, number), (6, 0, 0, deny)]
for number, place in ((openat, 32), (open_, 24)):  # a file may be opened for reading alone
    if number is not None:
        rules += [(0x15, 0, 4, number), (0x20, 0, 0, place), (0x45, 0, 1, 0x443), (6, 0, 0, deny), (0x20, 0, 0, 0)]
rules += [(6, 0, 0, 0x7FFF0000)]
code = b"".join(struct.pack("HBBI", *rule) for rule in rules)
held = ctypes.create_string_buffer(code)
libc = ctypes.CDLL(None, use_errno=True)
class Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
wanted = Filter(len(rules), ctypes.addressof(held))
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.byref(wanted), 0, 0):
    sys.exit(3)
del ctypes, libc
print("guarded", flush=True)
names = {"__name__": "__main__"}
exec(compile(program, "answer", "exec"), names)
print("\nPASSED-" + sys.argv[3], flush=True)
"""


@cache
def run_program(text: str) -> bool:
    """Whether a program comes to its end without an error.

    Raises:
        InputError: this machine cannot guard it.
    """
    if sys.platform != "linux" or os.uname().machine not in ("x86_64", "aarch64"):
        raise InputError(f"programs are run under Linux's seccomp, and this is {sys.platform}", "leave the task out")
    sign = os.urandom(8).hex()
    with tempfile.TemporaryDirectory() as folder:
        guard = Path(folder) / "guard.py"
        guard.write_text(GUARD, encoding="utf-8")
        command = [sys.executable, "-I", "-S", str(guard), str(SECONDS), str(MEMORY_BYTES), sign]
        try:
            done = subprocess.run(
                command, input=text.encode("utf-8", "replace"), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                cwd=folder, env={}, timeout=2 * SECONDS, check=False, start_new_session=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return False
    if not done.stdout.startswith(b"guarded"):
        raise InputError("programs cannot be run here: the kernel takes no seccomp filter", "leave the task out")
    return done.returncode == 0 and done.stdout.rstrip().endswith(f"PASSED-{sign}".encode())
