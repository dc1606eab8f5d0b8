"""The filter on a program's system calls: what a computation never needs is refused."""

import errno
import functools
import os
import struct

from rredcot_verl.rewards.sandbox import kernel
from rredcot_verl.rewards.sandbox.syscall_numbers import numbers_of

# Machines there is a table for, and the kernel's number of each.
MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# x86_64 numbers from here on belong to the x32 interface, which would go around the filter.
_X32_BIT = 0x40000000

_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NR_OFFSET, _ARCH_OFFSET, _ARGUMENTS_OFFSET = 0, 4, 16

# Refused always. Memory that no limit counts (memfd, System V), the network, other processes, the kernel's own doors.
_NEVER = """
socket io_uring_setup io_uring_enter io_uring_register
ptrace process_vm_readv process_vm_writev kcmp pidfd_open pidfd_getfd pidfd_send_signal process_madvise process_mrelease
rt_sigqueueinfo rt_tgsigqueueinfo tkill migrate_pages move_pages sched_setparam sched_setscheduler sched_setaffinity
sched_setattr setpriority ioprio_set
bpf perf_event_open userfaultfd keyctl add_key request_key seccomp personality modify_ldt iopl ioperm lookup_dcookie
mount umount2 pivot_root chroot unshare setns open_tree move_mount fsopen fsconfig fsmount fspick mount_setattr
name_to_handle_at open_by_handle_at fanotify_init swapon swapoff reboot kexec_load kexec_file_load init_module
finit_module delete_module acct quotactl settimeofday clock_settime clock_adjtime adjtimex sethostname setdomainname
syslog vhangup memfd_create memfd_secret shmget shmat shmctl msgget msgsnd msgrcv msgctl semget semop semctl mq_open
""".split()

# Refused where no private file system bounds what is written: everything that changes a file or a folder.
_CHANGES_FILES = """
creat mkdir mkdirat link linkat symlink symlinkat rename renameat renameat2 mknod mknodat unlink unlinkat rmdir truncate
chmod fchmod fchmodat fchmodat2 chown lchown fchownat utime utimes utimensat futimesat setxattr lsetxattr removexattr
lremovexattr openat2
""".split()

_CLONE_THREAD = 0x00010000
_CLONE_NAMESPACES = 0x7E020080
_WRITING_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# Ways to have the kernel send a signal to another process.
_F_SETOWN, _F_SETSIG, _F_SETOWN_EX = 8, 10, 15
_FIOSETOWN, _SIOCSPGRP = 0x8901, 0x8902


def _instruction(code: int, constant: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, constant & 0xFFFFFFFF)


def _load_argument(position: int) -> bytes:
    # The low half: both machines are little-endian, and every argument looked at is an int.
    return _instruction(_LOAD, _ARGUMENTS_OFFSET + 8 * position)


def _refuse(number: int) -> bytes:
    return _instruction(_RETURN, _ERRNO | number)


class _Filter:
    """Instructions under construction. Each rule ends with the system call's number still loaded, or returns."""

    def __init__(self, machine: str) -> None:
        self.numbers = numbers_of(machine)
        self.code = [
            _instruction(_LOAD, _ARCH_OFFSET),
            _instruction(_JUMP_EQUAL, MACHINES[machine], 1, 0),
            _instruction(_RETURN, _KILL),
            _instruction(_LOAD, _NR_OFFSET),
        ]
        if machine == "x86_64":
            self.code += [_instruction(_JUMP_AT_LEAST, _X32_BIT, 0, 1), _instruction(_RETURN, _KILL)]

    def rule(self, name: str, *body: bytes) -> None:
        """What happens on one system call; the body must return on every path."""
        if name in self.numbers:
            self.code += [_instruction(_JUMP_EQUAL, self.numbers[name], 0, len(body)), *body]

    def refuse(self, name: str, number: int = errno.EPERM) -> None:
        self.rule(name, _refuse(number))

    def refuse_bits(self, name: str, position: int, bits: int, number: int) -> None:
        """Refuse where an argument has any of these bits."""
        test = _instruction(_JUMP_ANY_BIT, bits, 0, 1)
        self.rule(name, _load_argument(position), test, _refuse(number), _instruction(_RETURN, _ALLOW))

    def refuse_unless(self, name: str, position: int, allowed: list[int]) -> None:
        """Refuse where an argument is none of these."""
        tests = [_instruction(_JUMP_EQUAL, value, len(allowed) - i, 0) for i, value in enumerate(allowed)]
        self.rule(name, _load_argument(position), *tests, _refuse(errno.EPERM), _instruction(_RETURN, _ALLOW))

    def refuse_values(self, name: str, position: int, refused: list[int]) -> None:
        """Refuse where an argument is one of these."""
        tests = [_instruction(_JUMP_EQUAL, value, len(refused) - i, 0) for i, value in enumerate(refused)]
        self.rule(name, _load_argument(position), *tests, _instruction(_RETURN, _ALLOW), _refuse(errno.EPERM))

    def finish(self) -> bytes:
        return b"".join([*self.code, _instruction(_RETURN, _ALLOW)])


@functools.lru_cache
def build_filter(*, own_pid: int, may_fork: bool, private: bool) -> bytes:
    """The filter's instructions.

    Args:
        own_pid: The program's process id, as it sees it: the one process it may signal.
        may_fork: Whether it may start processes. Threads are always allowed.
        private: Whether it has a file system and a process namespace of its own; if not, nothing may be opened for
            writing, and it may signal only itself.
    """
    code = _Filter(kernel.MACHINE)
    for name in _NEVER:
        code.refuse(name)
    # Without clone3 (whose flags a filter cannot read) the C library falls back to clone.
    code.refuse("clone3", errno.ENOSYS)
    if may_fork:
        code.refuse_bits("clone", 0, _CLONE_NAMESPACES, errno.EPERM)
    else:
        code.refuse("fork")
        code.refuse("vfork")
        test = _instruction(_JUMP_ANY_BIT, _CLONE_THREAD, 1, 0)
        namespaces = _instruction(_JUMP_ANY_BIT, _CLONE_NAMESPACES, 0, 1)
        refusal = _refuse(errno.EPERM)
        code.rule("clone", _load_argument(0), test, refusal, namespaces, refusal, _instruction(_RETURN, _ALLOW))
    code.refuse_unless("prlimit64", 0, [0, own_pid])
    code.refuse_values("fcntl", 1, [_F_SETOWN, _F_SETSIG, _F_SETOWN_EX])
    code.refuse_values("ioctl", 1, [_FIOSETOWN, _SIOCSPGRP])
    if not private:
        code.refuse_unless("kill", 0, [own_pid])
        code.refuse_unless("tgkill", 0, [own_pid])
        for name in _CHANGES_FILES:
            code.refuse(name, errno.EACCES)
        code.refuse_bits("open", 1, _WRITING_FLAGS, errno.EACCES)
        code.refuse_bits("openat", 2, _WRITING_FLAGS, errno.EACCES)
    return code.finish()


def install(instructions: bytes) -> None:
    """Filter this process from here on. Raises OSError."""
    kernel.load_seccomp_filter(instructions)
