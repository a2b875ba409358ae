"""A child process that stops at each of its file-system calls, so that it can be killed there, or the call can fail.

The parent traces the child it forked (ptrace, Linux on x86-64).  A filter in the child (seccomp) tells the kernel at
which calls to stop; apart from that, nothing in it is changed or instrumented.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import struct
import sys
from collections.abc import Callable
from typing import NamedTuple

CHANGING = {
    1: "write",
    18: "pwrite64",
    20: "writev",
    74: "fsync",
    75: "fdatasync",
    76: "truncate",
    77: "ftruncate",
    82: "rename",
    83: "mkdir",
    84: "rmdir",
    85: "creat",
    86: "link",
    87: "unlink",
    88: "symlink",
    162: "sync",
    258: "mkdirat",
    263: "unlinkat",
    264: "renameat",
    265: "linkat",
    266: "symlinkat",
    277: "sync_file_range",
    285: "fallocate",
    296: "pwritev",
    316: "renameat2",
    326: "copy_file_range",
}
"""The calls after which a disk may hold something else than before; ``openat`` joins them where it may create."""

_OTHERS = {
    0: "read",
    2: "open",
    3: "close",
    4: "stat",
    5: "fstat",
    6: "lstat",
    8: "lseek",
    17: "pread64",
    21: "access",
    32: "dup",
    33: "dup2",
    72: "fcntl",
    73: "flock",
    79: "getcwd",
    80: "chdir",
    89: "readlink",
    90: "chmod",
    91: "fchmod",
    92: "chown",
    93: "fchown",
    217: "getdents64",
    235: "utimes",
    257: "openat",
    260: "fchownat",
    262: "newfstatat",
    267: "readlinkat",
    268: "fchmodat",
    269: "faccessat",
    280: "utimensat",
    292: "dup3",
    332: "statx",
    439: "faccessat2",
}
_NAMES = CHANGING | _OTHERS
_OPENING = (2, 257)
_WRITES = {"write", "pwrite64"}
_TRACE_ME, _GO_ON, _GET_REGISTERS, _SET_REGISTERS, _TO_END_OF_CALL, _SET_OPTIONS = 0, 7, 12, 13, 24, 0x4200
_MARK_CALLS, _STOP_AT_FILTER, _KILL_WITH_PARENT = 0x1, 0x80, 0x100000
_AT_FILTER, _AT_END_OF_CALL = signal.SIGTRAP | 7 << 8, signal.SIGTRAP | 0x80
_NO_CALL = 2**64 - 1
_NO_NEW_PRIVILEGES, _FILTER_CALLS = (38, 1), (22, 2)


_REGISTERS = """r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs eflags rsp ss fs_base gs_base
    ds es fs gs"""


class _Registers(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in _REGISTERS.split()]


class Call(NamedTuple):
    """A file-system call that is about to be made.

    Attributes:
      index: how many were made before it.
      changing: whether a disk may hold something else afterwards.
      path: of the file or folder, also where the call names it by a descriptor; "" if that is not known.
      data: what is to be written; empty for all other calls.
      arguments: the first three, as numbers.
      offset: where in the file ``data`` goes.
    """

    index: int
    name: str
    changing: bool
    path: str
    data: bytes
    arguments: tuple[int, int, int]
    offset: int


class Act(NamedTuple):
    """What shall happen at a call: at most one of the first three, then perhaps a kill.

    Attributes:
      error: the call is not made and fails with this number.
      half: only half of what was to be written is written.
      send: this signal arrives when the call has returned.
      kill_before, kill_after: the process is killed without the call having been made, or when it has returned.
    """

    error: int = 0
    half: bool = False
    send: int = 0
    kill_before: bool = False
    kill_after: bool = False


NOTHING = Act()


class CannotTrace(Exception):
    """This machine does not let a process trace its child, or is none whose registers are known here."""


class Child:
    """A forked process that will run ``body``; it is stopped before its first line until :meth:`follow`.

    Args:
      changing: stop only at the calls that may change something.
    """

    def __init__(self, body: Callable[[], None], *, changing: bool = False) -> None:
        if sys.platform != "linux" or platform.machine() != "x86_64":
            raise CannotTrace("system calls are stopped on Linux on x86-64 only")
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
        self._libc.ptrace.restype = ctypes.c_long
        self.process = os.fork()
        if not self.process:
            code = 1
            try:
                if self._libc.ptrace(_TRACE_ME, 0, None, None) < 0:
                    os._exit(2)
                self._filter([*CHANGING, *_OPENING] if changing else [*_NAMES])
                os.kill(os.getpid(), signal.SIGSTOP)
                body()
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(self.process, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            raise CannotTrace("a child may not trace its system calls here")
        try:
            self._ptrace(_SET_OPTIONS, _MARK_CALLS | _STOP_AT_FILTER | _KILL_WITH_PARENT)
        except OSError as error:
            os.kill(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
            raise CannotTrace(f"tracing a child is not allowed here ({error.strerror})") from None
        self._memory = os.open(f"/proc/{self.process}/mem", os.O_RDONLY)

    def follow(self, at: Callable[[Call], Act], after: Callable[[Call, int], None] | None = None) -> tuple[int, int]:
        """(status as of waitpid, file-system calls made) of the child at its end.

        Args:
          at: says what happens at a call.
          after: told of every call that was made and what it returned, a negative number for an error.
        """
        index, signal_to_pass_on = 0, 0
        try:
            while True:
                self._ptrace(_GO_ON, signal_to_pass_on)
                status, signal_to_pass_on = self._wait(), 0
                if not os.WIFSTOPPED(status):
                    return status, index
                if status >> 8 != _AT_FILTER:
                    signal_to_pass_on = os.WSTOPSIG(status)
                    continue
                registers = _Registers()
                self._ptrace(_GET_REGISTERS, 0, ctypes.addressof(registers))
                call = self._call(index, registers)
                index += 1
                act = at(call)
                self._enter(act, call, registers)
                if act.error or act.kill_before or not (after or act.send or act.kill_after):
                    if after and act.error:
                        after(call, -act.error)
                    continue
                self._ptrace(_TO_END_OF_CALL, 0)
                status = self._wait()
                if status >> 8 != _AT_END_OF_CALL:
                    raise RuntimeError(f"{call.name} ended with status {status:#x}")
                self._ptrace(_GET_REGISTERS, 0, ctypes.addressof(registers))
                if after:
                    after(call, ctypes.c_longlong(registers.rax).value)
                if act.send:
                    os.kill(self.process, act.send)
                if act.kill_after:
                    os.kill(self.process, signal.SIGKILL)
        finally:
            os.close(self._memory)

    def _wait(self) -> int:
        return os.waitpid(self.process, 0)[1]

    def _filter(self, numbers: list[int]) -> None:
        load, equal, leave = 0x20, 0x15, 0x06
        go_on, stop = 0x7FFF0000, 0x7FF00000
        jumps = [(equal, len(numbers) - place, 0, number) for place, number in enumerate(numbers)]
        steps = [(load, 0, 0, 0), *jumps, (leave, 0, 0, go_on), (leave, 0, 0, stop)]
        code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
        program = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code))
        for option, value, more in ((*_NO_NEW_PRIVILEGES, 0), (*_FILTER_CALLS, program)):
            if self._libc.prctl(option, value, more, 0, 0):
                os._exit(2)

    def _enter(self, act: Act, call: Call, registers: _Registers) -> None:
        if act.error or act.kill_before:
            registers.orig_rax = _NO_CALL
            registers.rax = 2**64 - act.error if act.error else 0
        elif act.half and call.name in _WRITES:
            registers.rdx //= 2
        else:
            return
        self._ptrace(_SET_REGISTERS, 0, ctypes.addressof(registers))
        if act.kill_before:
            os.kill(self.process, signal.SIGKILL)

    def _call(self, index: int, registers: _Registers) -> Call:
        name = _NAMES[registers.orig_rax]
        first, second, third = registers.rdi, registers.rsi, registers.rdx
        changing, data, offset = registers.orig_rax in CHANGING, b"", 0
        if name in ("openat", "mkdirat", "unlinkat", "newfstatat", "statx", "faccessat", "faccessat2"):
            path = self._text(second)
            changing = changing or (name == "openat" and bool(third & os.O_CREAT))
        elif name in ("mkdir", "unlink", "open", "stat", "lstat", "access", "readlink", "rename", "truncate"):
            path = self._text(first)
            changing = changing or (name == "open" and bool(second & os.O_CREAT))
        else:
            path = self._name_of(ctypes.c_int(first & 0xFFFFFFFF).value)
        if name in _WRITES:
            data = os.pread(self._memory, third, second)
            offset = registers.r10 if name == "pwrite64" else self._place_of(first)
        return Call(index, name, changing, path, data, (first, second, third), offset)

    def _text(self, address: int) -> str:
        text = b""
        while b"\0" not in text:  # not beyond the end of the page: the next one may not be there
            text += os.pread(self._memory, 4096 - (address + len(text)) % 4096, address + len(text))
        return os.fsdecode(text.split(b"\0", 1)[0])

    def _name_of(self, descriptor: int) -> str:
        try:
            return os.readlink(f"/proc/{self.process}/fd/{descriptor}")  # noqa: PTH115  # " (deleted)" is no path
        except OSError:
            return ""

    def _place_of(self, descriptor: int) -> int:
        with open(f"/proc/{self.process}/fdinfo/{descriptor}", encoding="ascii") as about:  # noqa: PTH123
            return int(about.readline().split()[1])

    def _ptrace(self, request: int, data: int, address: int = 0) -> None:
        # GETREGS and SETREGS take their buffer as the last argument, the others a number.
        ctypes.set_errno(0)
        if self._libc.ptrace(request, self.process, None, address or data) < 0:
            number = ctypes.get_errno()
            if number and number != errno.ESRCH:  # a process that was killed is told of by waitpid
                raise OSError(number, os.strerror(number))
