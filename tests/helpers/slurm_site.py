"""Runs a command beside a Slurm cluster and the SkyPilot that drives it; all of it lives in
namespaces that end with the command.

    python -m tests.helpers.slurm_site pytest -m cloud

The site is two nodes and a login node on this machine. Its files in /etc, its users, its daemons,
ports and addresses exist only inside namespaces for mounts, network, processes and host names, its
disk is memory, and its network is one loopback; the machine keeps nothing of it but wheels below
.sky-env. Needs root and Debian's Slurm; where something is missing the command runs all the same,
and `missing` says why the cloud tests are skipped. Price: 6 GiB of memory for that disk, about 5 s
for the daemons, and once two minutes for the wheels.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SKY_ENV = ROOT / ".sky-env"
MISSING_VARIABLE, SITE_VARIABLE = "EMOTION_CLOUD_MISSING", "EMOTION_CLOUD_SITE"
CLUSTER, PARTITION, SPOT = "site", "steady", "spot"
NODES = {"node1": "127.0.0.11", "node2": "127.0.0.12"}
GPU = "H200"  # declared to Slurm; behind each stands an empty file
PREEMPTION_GRACE_S = 20  # what the partition of that name gives a job that has to go
_FOLDER = "emotion-site-"
_WHEELS = ("wheels-node", "wheels-project")
_USER, _UID = "trainer", 45_678
_PROGRAMS = {
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "munged": "munge",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
}
_PROGRAMS |= {"rsync": "rsync", "unshare": "util-linux", "ip": "iproute2", "openssl": "openssl"}
_READY_S = 60
_DAEMONS: list[subprocess.Popen[bytes]] = []  # a handle that is let go warns that its process still runs


@dataclass(frozen=True)
class Site:
    """A running site; `folder` holds everything that it writes and `shared` is for files that all
    its nodes read.
    """

    folder: Path
    shared: Path
    sky_environment: dict[str, str]

    @classmethod
    def of_this_process(cls) -> Site:
        values = json.loads(Path(os.environ[SITE_VARIABLE]).read_text())
        return cls(Path(values["folder"]), Path(values["shared"]), values["sky_environment"])

    def sky(self, *words: str, timeout_s: float = 1200, check: bool = True) -> str:
        """What one `sky` command prints, stdout and stderr together; raises with it when the
        command fails and `check` is set.
        """
        line = [str(SKY_ENV / "bin" / "sky"), *words]
        done = subprocess.run(
            line,
            env=self.sky_environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            cwd=ROOT,
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(line)} ended with {done.returncode}:\n{done.stdout[-6000:]}")
        return done.stdout

    def slurm(self, *words: str) -> str:
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=60, cwd="/").stdout

    def node_of(self, job_name: str) -> str:
        """The node on which the newest Slurm job of a SkyPilot cluster or managed job runs."""
        jobs = [
            line.split() for line in self.slurm("squeue", "-h", "-t", "running", "-o", "%j %N").splitlines()
        ]
        return next(node for name, node in reversed(jobs) if name.startswith(job_name))

    def preempt(self, node: str) -> None:
        """Slurm takes the node for a more important job, which ends at once: whatever runs in
        `SPOT` there has to go.
        """
        self.slurm("sbatch", "-p", PARTITION, "-w", node, "-c", "8", "-o", "/dev/null", "--wrap", "true")

    def set_down(self, node: str) -> None:
        """The administrator declares the node broken; Slurm kills what runs there."""
        self.slurm("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")

    def set_up(self, node: str) -> None:
        self.slurm("scontrol", "update", f"NodeName={node}", "State=RESUME")

    def cut_power(self, node: str) -> None:
        """Every process of the node is gone at once, and so is its /tmp; Slurm finds out by
        itself.
        """
        daemon = int((self.folder / "slurm" / f"{node}.pid").read_text())
        name_space = os.readlink(f"/proc/{daemon}/ns/uts")
        while victims := [
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and _lives_in(entry, name_space)
        ]:
            for victim in victims:
                with suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
        for left in (self.folder / "tmp" / node).iterdir():
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()

    def switch_on(self, node: str) -> None:
        _daemon(self.folder, node, [*_machine(self.folder), node, "slurmd", "-D", "-N", node])


def _lives_in(process: Path, name_space: str) -> bool:
    """Whether a process has that UTS name space; one that has ended but that nobody has waited for
    has none.
    """
    try:
        return os.readlink(process / "ns" / "uts") == name_space
    except OSError:
        return False


def missing() -> str | None:
    """Why there can be no site here, and what to type; None where there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "the cloud tests set up Slurm in namespaces, which takes root on Linux"
    packages = sorted(
        {package for program, package in _PROGRAMS.items() if shutil.which(program, path=_path()) is None}
    )
    if packages:
        return f"packages are missing; type apt-get install --no-install-recommends {' '.join(packages)}"
    probe = subprocess.run([*_unshare(), "true"], capture_output=True, text=True)
    if probe.returncode:
        return f"this machine allows no namespaces ({probe.stderr.strip()})"
    if not (SKY_ENV / "bin" / "sky").exists():
        return "SkyPilot is not installed; type make sky-env"
    if _python_310() is None:
        return "no Python 3.10 is installed, which SkyPilot's own processes on a node need"
    return None


def main(command: Sequence[str]) -> int:
    reason = missing()
    if reason is not None:
        return subprocess.call(command, env={**os.environ, MISSING_VARIABLE: reason})
    _build_wheels()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    _remove_leftovers()
    # the nodes have a /tmp of their own; paths of sockets must be short
    folder = Path(tempfile.mkdtemp(prefix=f"{_FOLDER}{os.getpid()}-", dir="/var/tmp"))
    folder.chmod(0o755)
    line = [sys.executable, "-m", "tests.helpers.slurm_site", "--inside", str(folder), *command]
    try:
        with subprocess.Popen([*_unshare(), *line], cwd=ROOT, preexec_fn=_die_with_parent) as process:
            try:
                while True:
                    # the command hears of Ctrl-C too, and ends in its own way
                    with suppress(KeyboardInterrupt):
                        return process.wait()
            finally:
                process.kill()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_leftovers() -> None:
    """The folders of sites whose first process was killed; their namespaces went with it."""
    for folder in Path("/var/tmp").glob(f"{_FOLDER}*-*"):
        if not Path("/proc", folder.name.removeprefix(_FOLDER).partition("-")[0]).exists():
            shutil.rmtree(folder, ignore_errors=True)


def _die_with_parent() -> None:
    """Ask Linux for SIGKILL when the process that started this one is gone, even killed; `unshare`
    ends its namespaces then.
    """
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _unshare() -> list[str]:
    return [
        "unshare",
        "--mount",
        "--net",
        "--uts",
        "--ipc",
        "--pid",
        "--fork",
        "--kill-child=KILL",
        "--mount-proc",
    ]


def _path() -> str:
    return f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


# ---- before the namespaces: what has to be downloaded


def _python_310() -> Path | None:
    """The prefix of a CPython 3.10: on PATH, or of pyenv or uv."""
    found = [Path(path) for path in [shutil.which("python3.10")] if path]
    for place in (Path.home() / ".pyenv" / "versions", Path.home() / ".local" / "share" / "uv" / "python"):
        found += sorted(place.glob("*3.10*/bin/python3.10"))
    for python in found:
        probe = subprocess.run(
            [python, "-c", "import sys; print(sys.base_prefix)"], capture_output=True, text=True
        )
        if probe.returncode == 0:
            return Path(probe.stdout.strip())
    return None


def _build_wheels() -> None:
    """Wheels of what a node installs: SkyPilot's own runtime, and this project's lock with
    torch.
    """
    prefix = _python_310()
    assert prefix is not None
    lock = ROOT / "requirements.lock"
    if not (SKY_ENV / "wheels-node" / "complete").exists():
        print("building the wheels of SkyPilot's runtime", flush=True)
        build = SKY_ENV / "python3.10"
        subprocess.run([prefix / "bin" / "python3.10", "-m", "venv", "--clear", build], check=True)
        pip: list[str | Path] = [build / "bin" / "pip", "--disable-pip-version-check", "-q"]
        version = subprocess.check_output(
            [SKY_ENV / "bin" / "python", "-c", "import sky; print(sky.__version__)"], text=True
        ).strip()
        subprocess.run([*pip, "install", "wheel", "setuptools<81"], check=True)
        wheel = [*pip, "wheel", "-w", SKY_ENV / "wheels-node"]
        # an old source distribution
        subprocess.run([*wheel, "--no-build-isolation", "python-hostlist"], check=True)
        subprocess.run(
            [*wheel, f"skypilot[slurm,remote]=={version}", "awscli", "pip", "setuptools", "wheel"], check=True
        )
        for own in (SKY_ENV / "wheels-node").glob("skypilot-*.whl"):  # SkyPilot brings that one itself
            own.unlink()
        (SKY_ENV / "wheels-node" / "complete").touch()
    stamp = SKY_ENV / "wheels-project" / "complete"
    if not stamp.exists() or stamp.stat().st_mtime < lock.stat().st_mtime:
        print("downloading the wheels of requirements.lock", flush=True)
        download: list[str | Path] = [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "download",
            "-q",
            "--no-deps",
            "-d",
            stamp.parent,
        ]
        subprocess.run([*download, f"torch=={_torch_version()}"], check=True)
        subprocess.run([*download, "-r", lock], check=True)
        stamp.touch()


def _torch_version() -> str:
    import torch

    return torch.__version__.partition("+")[0]


# ---- inside the namespaces


def _inside(folder: Path, command: Sequence[str]) -> int:
    """The first process of the namespaces: waits for whatever ends, and ends with the command,
    which ends everything else.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            code = _run_beside_site(folder, command)
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        os._exit(code)
    while True:
        ended, status = os.wait()
        if ended == child:
            return abs(os.waitstatus_to_exitcode(status))


def _run_beside_site(folder: Path, command: Sequence[str]) -> int:
    site = _start(folder)
    note = folder / "site.json"
    note.write_text(json.dumps(asdict(site), default=str))
    return subprocess.call(command, cwd=ROOT, env={**os.environ, "PATH": _path(), SITE_VARIABLE: str(note)})


def _start(folder: Path) -> Site:
    """All daemons, up and answering."""
    os.environ["PATH"] = _path()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", folder], check=True)
    _empty_tmp(folder)
    for number, address in enumerate(("8.8.8.8", *NODES.values())):
        if number == 0:
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        subprocess.run(["ip", "address", "add", f"{address}/32", "dev", "lo"], check=True)
    home, shared, client = folder / "home", folder / "shared", folder / "client"
    for made in (home, shared, client, folder / "bin", folder / "log"):
        made.mkdir()
    shared.chmod(0o1777)
    for own in (home,):
        os.chown(own, _UID, _UID)
    for name in _WHEELS:  # into sight of the nodes, wherever this project lies
        (folder / name).mkdir()
        subprocess.run(["mount", "--bind", SKY_ENV / name, folder / name], check=True)
    _lay_out_etc(folder, home)
    _lay_out_programs(folder)
    _lay_out_client(client, folder)
    _lay_out_machines(folder)
    machine = _machine(folder)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/run"], check=True)
    for place, owner in (
        ("/run/sshd", "root"),
        ("/run/munge", "munge"),
        ("/run/log-munge", "munge"),
        ("/run/lib-munge", "munge"),
    ):
        Path(place).mkdir(mode=0o755)
        shutil.chown(place, owner, owner)
    munged = [
        "munged",
        "--foreground",
        "--log-file=/run/log-munge/log",
        "--pid-file=/run/munge/pid",
        "--seed-file=/run/lib-munge/seed",
    ]
    _daemon(folder, "munged", ["setpriv", "--reuid=munge", "--regid=munge", "--clear-groups", "--", *munged])
    _wait(lambda: Path("/run/munge/munge.socket.2").exists(), "munged", folder)
    _daemon(folder, "slurmctld", [*machine, "login", "slurmctld", "-D", "-c"])
    _daemon(
        folder, "sshd", [*machine, "login", "/usr/sbin/sshd", "-D", "-e", "-f", str(folder / "sshd_config")]
    )
    for node in NODES:
        _daemon(folder, node, [*machine, node, "slurmd", "-D", "-N", node])
    _daemon(
        folder,
        "internet",
        [sys.executable, "-m", "tests.helpers.answering_server", "8.8.8.8", str(folder / "server.pem")],
    )
    idle = ["sinfo", "-h", "-N", "-p", PARTITION, "-t", "idle", "-o", "%N"]
    _wait(
        lambda: len(subprocess.run(idle, capture_output=True, text=True).stdout.split()) == len(NODES),
        "slurmctld",
        folder,
    )
    return Site(folder, shared, _sky_environment(folder, client))


def _empty_tmp(folder: Path) -> None:
    """An own /tmp: SkyPilot keeps sockets and files there under fixed names, and sockets do not
    know of separate networks.

    Of what lies in the machine's /tmp, this project and its Python stay in sight.
    """
    needed = [path for path in (ROOT, Path(sys.prefix), Path(sys.base_prefix)) if path.is_relative_to("/tmp")]
    for number, path in enumerate(needed):
        (folder / "kept" / "here" / f"{number}").mkdir(parents=True)
        subprocess.run(["mount", "--bind", path, folder / "kept" / "here" / f"{number}"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", "/tmp"], check=True)
    for number, path in enumerate(needed):
        path.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "--bind", folder / "kept" / "here" / f"{number}", path], check=True)


def _daemon(folder: Path, name: str, line: Sequence[str]) -> None:
    with (folder / "log" / name).open("ab") as log:
        started = subprocess.Popen(
            line, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    _DAEMONS.append(started)


def _wait(ready: object, name: str, folder: Path) -> None:
    assert callable(ready)
    deadline = time.monotonic() + _READY_S
    while not ready():
        if time.monotonic() > deadline:
            logs = "\n".join(
                f"{log.name}: {log.read_text(errors='replace')[-1500:]}" for log in (folder / "log").iterdir()
            )
            raise RuntimeError(f"{name} did not start:\n{logs}")
        time.sleep(0.2)


def _lay_out_etc(folder: Path, home: Path) -> None:
    """A copy of /etc with the site's files, put over the machine's for these namespaces only."""
    etc = folder / "etc"
    subprocess.run(["cp", "-a", "/etc", etc], check=True)
    _append(etc / "passwd", f"{_USER}:*:{_UID}:{_UID}::{home}:/bin/bash\n")
    _append(etc / "group", f"{_USER}:x:{_UID}:\n")
    _append(
        etc / "hosts", "127.0.0.1 login\n" + "".join(f"{address} {name}\n" for name, address in NODES.items())
    )
    (etc / "profile.d").mkdir(exist_ok=True)
    (etc / "profile.d" / "site.sh").write_text(f"export PATH={folder}/bin:$PATH\n")
    shutil.rmtree(etc / "slurm", ignore_errors=True)
    (etc / "slurm").mkdir()
    (etc / "slurm" / "slurm.conf").write_text(_slurm_conf(folder))
    (etc / "slurm" / "gres.conf").write_text(_gres_conf(folder))
    prolog = etc / "slurm" / "prolog.sh"
    prolog.write_text(_PROLOG.format(user=_USER, home=home, bin=folder / "bin"))
    prolog.chmod(0o755)
    (etc / "uv").mkdir(exist_ok=True)
    links = ", ".join(f'"{folder / name}"' for name in _WHEELS)
    (etc / "uv" / "uv.toml").write_text(
        'python-downloads = "never"\npython-preference = "only-system"\nno-index = true\n'
        f'find-links = [{links}]\ncache-dir = "{folder / "shared" / "uv"}"\nlink-mode = "hardlink"\n'
    )
    if not (etc / "munge" / "munge.key").exists():
        key = etc / "munge" / "munge.key"
        key.parent.mkdir(exist_ok=True)
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        shutil.chown(key, "munge", "munge")
    subprocess.run(["mount", "--bind", etc, "/etc"], check=True)


def _append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def _slurm_conf(folder: Path) -> str:
    state = folder / "slurm"
    (state / "state").mkdir(parents=True)
    facts = {
        "ClusterName": CLUSTER,
        "SlurmctldHost": "login(127.0.0.1)",
        "SlurmUser": "root",
        "AuthType": "auth/munge",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "AccountingStorageType": "accounting_storage/none",
        "MpiDefault": "none",
        "SwitchType": "switch/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU",
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "CANCEL",
        "ReturnToService": "2",
        "KillWait": "5",
        "SlurmdTimeout": "20",  # a node that does not answer for so long is DOWN
        "MinJobAge": "60",
        "PrologSlurmctld": "/etc/slurm/prolog.sh",
        "SlurmdParameters": "config_overrides",  # the CPUs that are declared, not those of this machine
        "GresTypes": "gpu",
        "StateSaveLocation": f"{state}/state",
        "SlurmctldPidFile": f"{state}/slurmctld.pid",
        "SlurmdPidFile": f"{state}/%n.pid",
        "SlurmdSpoolDir": f"{state}/spool-%n",
    }
    nodes = [
        f"NodeName={name} NodeHostname={name} NodeAddr={address} Port={16_820 + number} CPUs=8"
        f" RealMemory=16000 Gres=gpu:{GPU}:8"
        for number, (name, address) in enumerate(NODES.items())
    ]
    times = f"Nodes={','.join(NODES)} MaxTime=1-00:00:00 DefaultTime=04:00:00 State=UP OverSubscribe=NO"
    partitions = [
        f"PartitionName={PARTITION} Default=YES {times} PriorityTier=10",
        f"PartitionName={SPOT} {times} PriorityTier=1 PreemptMode=CANCEL GraceTime={PREEMPTION_GRACE_S}",
    ]
    return "\n".join([*(f"{name}={value}" for name, value in facts.items()), *nodes, *partitions, ""])


def _gres_conf(folder: Path) -> str:
    lines = ["AutoDetect=off"]
    (folder / "gpu").mkdir()
    for node in NODES:
        for number in range(8):
            (folder / "gpu" / f"{node}-{number}").touch()
        lines.append(f"NodeName={node} Name=gpu Type={GPU} File={folder}/gpu/{node}-[0-7]")
    return "\n".join([*lines, ""])


# SkyPilot looks for uv in the home that it gives each cluster, and would download it where there is
# none
_PROLOG = """#!/bin/bash
[[ "$SLURM_JOB_USER" == {user} && "$SLURM_JOB_NAME" =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || exit 0
setpriv --reuid={user} --regid={user} --clear-groups -- sh -c '
  mkdir -p "$1/.local/bin" && ln -sf {bin}/uv {bin}/uvx "$1/.local/bin/"' sh {home}/.sky_clusters/"$SLURM_JOB_NAME"
exit 0
"""


def _lay_out_programs(folder: Path) -> None:
    """On the PATH of the site: uv, SkyPilot's Python 3.10, and the Python that runs this
    project.
    """
    prefix = _python_310()
    assert prefix is not None
    own = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for name, target in (
        ("python3.10", prefix / "bin" / "python3.10"),
        (own, Path(sys.base_prefix, "bin", own)),
    ):
        (folder / "bin" / name).symlink_to(target)
    for name in ("uv", "uvx"):
        shutil.copy2(SKY_ENV / "bin" / name, folder / "bin" / name)


def _lay_out_client(client: Path, folder: Path) -> None:
    """The home of the person who types `sky`, and the login node's door for that person."""
    for made in (client / ".ssh", client / ".slurm", client / ".sky", folder / "home" / ".ssh"):
        made.mkdir(mode=0o700, parents=True)
    for key in (client / ".ssh" / "site", folder / "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    authorized = folder / "home" / ".ssh" / "authorized_keys"
    shutil.copy(client / ".ssh" / "site.pub", authorized)
    authorized.chmod(0o600)
    for own in (authorized, authorized.parent):
        os.chown(own, _UID, _UID)
    (folder / "sshd_config").write_text(
        f"Port 2222\nListenAddress 127.0.0.1\nHostKey {folder}/host_key\nPidFile none\nAllowUsers"
        f" {_USER}\nUsePAM no\nStrictModes no\nPermitRootLogin no\nPasswordAuthentication"
        " no\nKbdInteractiveAuthentication no\nMaxSessions 200\nMaxStartups 200:30:300\nSetEnv"
        f" PATH={folder}/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin\n"
    )
    (client / ".slurm" / "config").write_text(
        f"Host {CLUSTER}\n  HostName 127.0.0.1\n  Port 2222\n  User {_USER}\n  IdentityFile"
        f" {client}/.ssh/site\n  IdentitiesOnly yes\n"
    )
    lay_out_catalog(client)
    (client / ".sky" / "config.yaml").write_text("jobs:\n  controller:\n    consolidation_mode: true\n")
    request: list[str | Path] = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=8.8.8.8",
    ]
    request += [
        "-addext",
        "subjectAltName=IP:8.8.8.8",
        "-keyout",
        folder / "key.pem",
        "-out",
        folder / "certificate.pem",
    ]
    subprocess.run(request, check=True, capture_output=True)
    (folder / "server.pem").write_text(
        (folder / "key.pem").read_text() + (folder / "certificate.pem").read_text()
    )


def lay_out_catalog(home: Path) -> None:
    """The one file without which SkyPilot knows no name of a GPU; it would download it, and never
    replaces one that lies there.
    """
    catalog = home / ".sky" / "catalogs" / "v8" / "common" / "accelerators.csv"
    catalog.parent.mkdir(parents=True, exist_ok=True)
    names = ("A10G", "A100-80GB", "H100", "H200", "L4", "L40S")
    catalog.write_text("AcceleratorName,Clouds\n" + "".join(f"{name},\"['AWS', 'GCP']\"\n" for name in names))


def _sky_environment(folder: Path, client: Path) -> dict[str, str]:
    """The variables of `sky`: a home of its own, nothing sent to SkyPilot's makers, and trust in
    the site's only web server.

    The controller of managed jobs looks at no cluster while https://8.8.8.8 does not answer; here
    that address is the site's.
    """
    certificate = str(folder / "certificate.pem")
    return {
        "HOME": str(client),
        "PATH": f"{SKY_ENV}/bin:{_path()}",
        "LANG": "C.UTF-8",
        "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
        "SSL_CERT_FILE": certificate,
        "REQUESTS_CA_BUNDLE": certificate,
    }


def _lay_out_machines(folder: Path) -> None:
    """The script that makes a machine.

    The folders that an ordinary user has to read may lie below one that is closed to others, such
    as /root: an empty one takes its place.
    """
    prefix = _python_310()
    assert prefix is not None
    needed = [prefix, Path(sys.base_prefix)]
    lines = ["set -e", 'hostname "$1"']
    closed: dict[Path, list[Path]] = {}
    for path in needed:
        for parent in reversed(path.resolve().parents):
            if not parent.stat().st_mode & 0o001:
                closed.setdefault(parent, []).append(path.resolve())
                break
    for number, path in enumerate(path for paths in closed.values() for path in paths):
        lines += [f"mkdir -p {folder}/kept/$1/{number}", f"mount --bind {path} {folder}/kept/$1/{number}"]
    for parent in closed:
        lines.append(f"mount -t tmpfs -o mode=755 tmpfs {parent}")
    for number, path in enumerate(path for paths in closed.values() for path in paths):
        lines += [f"mkdir -p {path}", f"mount --bind {folder}/kept/$1/{number} {path}"]
    lines += [
        f"mkdir -p {folder}/tmp/$1",
        f"chmod 1777 {folder}/tmp/$1",
        f"mount --bind {folder}/tmp/$1 /tmp",
        "shift",
        'cd /; exec "$@"',
    ]
    (folder / "machine.sh").write_text("\n".join(lines) + "\n")


def _machine(folder: Path) -> list[str]:
    """Words before NAME PROGRAM that start the program on a machine of that name with a /tmp of its
    own.
    """
    return ["unshare", "--mount", "--uts", "bash", str(folder / "machine.sh")]


if __name__ == "__main__":
    words = sys.argv[1:]
    sys.exit(_inside(Path(words[1]), words[2:]) if words[:1] == ["--inside"] else main(words))
