"""Tars in a bucket beside the same tars on disk: the index, the reading of units, the whole job.

    python tests/bench/bench_remote_tars.py [--documents N] [--rounds N] [--model tiny|small]
    [--endpoint URL]

The bucket is of moto's server, in a process of its own on this machine, or of the S3 server
``--endpoint`` (keys from the environment). Disk and bucket are timed in turn. Wall time: a process
that waits for a server uses no CPU. Requests are those for bytes of tars; peak memory is that of
the job's process.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(*server.get_host_and_port(), flush=True)
sys.stdin.read()
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", choices=("tiny", "small"), default="small")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--endpoint", default="")
    args = parser.parse_args()
    with server(args.endpoint) as endpoint, tempfile.TemporaryDirectory() as folder:
        # Before the other benchmark copies the environment for its processes.
        os.environ["AWS_ENDPOINT_URL"] = endpoint
        compare(args, Path(folder))


@contextmanager
def server(endpoint: str) -> Iterator[str]:
    """Yield the address of an S3 server."""
    os.environ.setdefault("AWS_ACCESS_KEY_ID", "key")
    os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "secret")
    os.environ.setdefault("AWS_REGION", "us-east-1")
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
    if endpoint:
        yield endpoint
        return
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield "http://{}:{}".format(*process.stdout.readline().split())
        process.stdin.close()


def compare(args: argparse.Namespace, folder: Path) -> None:
    import botocore.session
    from bench_job import N_UNITS, measure
    from documents import make_documents, make_model
    from measure import print_machine

    from gradproj.corpus.index import build_index
    from gradproj.corpus.prepare import prepare
    from gradproj.corpus.prepare_config import PrepareConfig
    from gradproj.corpus.stream import read_documents
    from gradproj.corpus.tar.paths import list_tars
    from gradproj.storage.address import Address
    from gradproj.storage.object_path import object_at
    from gradproj.storage.stream import ObjectStream

    print_machine("obstore")
    documents = make_documents(folder, args.documents)
    model = make_model(folder / "model", args.model, folder / "tokenizer")
    local, per_tar = folder / "tars", -(-args.documents // 3)
    prepare(
        PrepareConfig(inputs=(str(documents),), output_dir=str(local), samples_per_shard=per_tar),
        progress=False,
    )
    bucket = Address("s3", f"bench-{os.getpid()}")
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    client = botocore.session.Session().create_client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket=bucket.bucket)
    for tar in sorted(local.glob("*.tar")):
        object_at(bucket / "tars" / tar.name).put([tar.read_bytes()])
    places = {"disk": str(local), "bucket": str(bucket / "tars")}
    n_bytes = sum(tar.stat().st_size for tar in local.glob("*.tar"))
    print(
        f"{args.documents} documents, {n_bytes / 1e6:.1f} MB in {len(list_tars(str(local)))} tars"
    )

    seconds: dict[tuple[str, str], list[float]] = {}
    peaks: dict[str, list[float]] = {place: [] for place in places}
    real, requests = ObjectStream._get, []
    for number in range(args.rounds):
        for place, shards in places.items():

            def note(part: str, started: float, place: str = place) -> None:
                seconds.setdefault((part, place), []).append(time.perf_counter() - started)

            started = time.perf_counter()
            index = build_index(list_tars(shards), progress=False)
            note("index", started)
            started = time.perf_counter()
            requests.clear()
            counted = patch.object(
                ObjectStream, "_get", lambda self, o: requests.append(o) or real(self, o)
            )
            rows = args.documents // N_UNITS
            with counted:
                for start in range(0, args.documents, rows):
                    for _ in read_documents(index, start, min(start + rows, args.documents)):
                        pass
            note("units read", started)
            output = folder / f"{place}-{number}"
            run = measure("job", args.cores, shards, model, output, args.documents)
            seconds.setdefault(("job", place), []).append(run["wall"])
            peaks[place].append(run["peak"] / 1024)
    for part in ("index", "units read", "job"):
        disk, remote = (statistics.median(seconds[part, place]) for place in places)
        spread = ", ".join(f"{value:.2f}" for value in seconds[part, "bucket"])
        print(
            f"{part:11} disk {disk:7.3f} s  bucket {remote:7.3f} s ({spread})  {remote / disk:.3f}"
        )
    disk, remote = (statistics.median(peaks[place]) for place in places)
    print(f"{'peak memory':11} disk {disk:7.0f} MiB bucket {remote:5.0f} MiB  {remote / disk:.3f}")
    print(f"requests    {len(requests)} for {N_UNITS} units of {len(list_tars(str(local)))} tars")


if __name__ == "__main__":
    main()
