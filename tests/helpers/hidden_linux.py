"""Python as this project's pages would find it on Windows: modules and names of Unix and Linux are
hidden from them, and from them alone. Run as `python -m tests.helpers.hidden_linux VERB …`; other
packages are built for the system at hand and see all of it.
"""

from __future__ import annotations

import builtins
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

OWN = ("emotion_train", "launch")
MODULES = {
    *("fcntl", "resource", "pwd", "grp", "spwd", "crypt", "termios", "tty", "pty", "posix", "syslog"),
    *("ctypes", "readline", "curses", "_posixsubprocess"),
}
# of what is left, the names that Windows lacks: https://docs.python.org/3/library/os.html, signal
NAMES: dict[str, set[str]] = {
    "os": {
        *("chown", "chroot", "ctermid", "fchmod", "fchown", "fork", "forkpty", "fstatvfs", "getegid"),
        *("geteuid", "getgid", "getgroups", "getloadavg", "getpgid", "getpgrp", "getpriority", "getsid"),
        *("getuid", "initgroups", "killpg", "lchown", "lockf", "major", "makedev", "minor", "mkfifo"),
        *("mknod", "nice", "openpty", "pathconf", "posix_fadvise", "posix_fallocate", "posix_spawn"),
        *("pread", "preadv", "pwrite", "pwritev", "readv", "sched_getaffinity", "sched_setaffinity"),
        *("sched_yield", "sendfile", "setegid", "seteuid", "setgid", "setgroups", "setpgid", "setsid"),
        *("setuid", "statvfs", "sync", "sysconf", "tcgetpgrp", "tcsetpgrp", "ttyname", "uname", "wait"),
        *("writev", "eventfd", "memfd_create", "pidfd_open", "splice", "copy_file_range", "getrandom"),
        *("O_NOFOLLOW", "O_DIRECTORY", "O_CLOEXEC", "O_NONBLOCK", "O_DIRECT", "O_TMPFILE", "O_SYNC"),
        *("POSIX_FADV_DONTNEED", "WNOHANG", "WIFSIGNALED", "WTERMSIG", "environb", "fsencodeb"),
    },
    "signal": {
        *("SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGCHLD", "SIGPIPE", "SIGQUIT", "SIGXFSZ"),
        *("SIGSTOP", "SIGCONT", "SIGTSTP", "SIGWINCH", "SIGXCPU", "SIG_BLOCK", "SIG_UNBLOCK"),
        *("SIG_SETMASK", "alarm", "pause", "pthread_kill", "pthread_sigmask", "setitimer", "siginterrupt"),
        *("sigpending", "sigtimedwait", "sigwait", "sigwaitinfo"),
    },
    "time": {"clock_settime", "tzset", "pthread_getcpuclockid"},
    "select": {"poll", "epoll", "devpoll", "kqueue"},
    "socket": {"AF_UNIX", "AF_NETLINK", "sethostname", "if_nameindex_", "SO_REUSEPORT"},
}
INSTEAD: dict[str, dict[str, object]] = {"os": {"name": "nt"}, "sys": {"platform": "win32"}}


class Hidden(types.ModuleType):
    """A module without some of its names and with others of Windows."""

    def __init__(self, real: types.ModuleType) -> None:
        super().__init__(real.__name__)
        self.__dict__["_real"] = real

    def __getattr__(self, name: str) -> Any:
        real = self.__dict__["_real"]
        if name in NAMES.get(real.__name__, ()):
            raise AttributeError(f"module {real.__name__!r} has no attribute {name!r} on Windows")
        return INSTEAD.get(real.__name__, {}).get(name, getattr(real, name))


def is_own(name: object) -> bool:
    return isinstance(name, str) and name.split(".")[0] in OWN


def hide() -> None:
    """From here on, for every page that is imported later."""
    real_import, hidden = builtins.__import__, dict[str, Hidden]()

    def import_(
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> types.ModuleType:
        own = level == 0 and is_own((globals or {}).get("__name__"))
        if own and name.split(".")[0] in MODULES:
            raise ModuleNotFoundError(f"No module named {name!r} on Windows", name=name)
        found = real_import(name, globals, locals, fromlist or (), level)
        if own and name in {*NAMES, *INSTEAD}:
            return hidden.setdefault(name, Hidden(found))
        return found

    def audit(event: str, given: tuple[object, ...]) -> None:
        """Files of Linux alone, opened by a page of ours by way of the standard library."""
        if event in ("open", "os.listdir", "os.scandir") and str(given[0]).startswith(("/proc", "/sys/")):
            for name in _callers():
                if is_own(name):
                    raise FileNotFoundError(f"{given[0]} does not exist on Windows ({name})")
                if name.split(".")[0] not in sys.stdlib_module_names:
                    return

    builtins.__import__ = import_
    sys.addaudithook(audit)


def _callers() -> Iterable[str]:
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None:
        yield str(frame.f_globals.get("__name__", ""))
        frame = frame.f_back


def main(words: Sequence[str]) -> int:
    hide()
    from emotion_train.cli import main as verb

    assert not [name for name in sys.modules if is_own(name) and Path(name).suffix == "x"]
    return verb(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
