"""A bucket of an S3 server: moto's, in memory, or the one that the environment names.

``GRADPROJ_TEST_S3`` is the endpoint of another server, with its keys in ``AWS_ACCESS_KEY_ID`` and
``AWS_SECRET_ACCESS_KEY``; ``launch/test_s3.sh`` sets them. Or one of Azure or Google: emulators.py.
"""

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any

import botocore.session
from helpers.emulators import Emulator, emulator

from gradproj.storage.address import Address

_numbers = count()


@dataclass(frozen=True)
class S3Server:
    """An S3 server and the environment of its users."""

    url: str
    environment: dict[str, str]
    is_shared: bool = False

    @property
    def secret(self) -> str:
        """The key of its users, which belongs in no file and no message."""
        return self.environment["AWS_SECRET_ACCESS_KEY"]

    @cached_property
    def client(self) -> Any:
        """Return botocore's client: another one than gradproj's."""
        env = self.environment
        return botocore.session.Session().create_client(
            "s3",
            region_name="us-east-1",
            endpoint_url=self.url,
            aws_access_key_id=env["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=env["AWS_SECRET_ACCESS_KEY"],
        )

    def new_bucket(self) -> Address:
        """Make an empty bucket; of a server that is not ours an unused folder of one bucket."""
        name, number = f"test-{os.getpid()}", next(_numbers)
        if not self.is_shared:
            self.client.create_bucket(Bucket=f"{name}-{number}")
            return Address("s3", f"{name}-{number}")
        if not number:  # some servers reserve space for each bucket
            self.client.create_bucket(Bucket=name)
        return Address("s3", name, f"folder-{number}")


@contextmanager
def s3_server() -> Iterator[S3Server | Emulator]:
    """Start moto's server in a thread, unless the environment names another one."""
    with emulator() as other:
        if other is not None:
            yield other
            return
    keys = {
        "AWS_ACCESS_KEY_ID": os.environ.get("AWS_ACCESS_KEY_ID", "key"),
        "AWS_SECRET_ACCESS_KEY": os.environ.get("AWS_SECRET_ACCESS_KEY", "secret-of-the-tests"),
    }
    url = os.environ.get("GRADPROJ_TEST_S3", "")
    stop = None
    if not url:
        from moto.moto_server.werkzeug_app import create_backend_app
        from werkzeug.serving import make_server

        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
        # S3 alone: moto's server of all services lists its own folders at each request to find out
        # which is meant, which is 40 % of its time.
        server = make_server("127.0.0.1", 0, create_backend_app("s3"), True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        stop = server.shutdown
        url = f"http://127.0.0.1:{server.port}"
    environment = {
        **keys,
        "AWS_ENDPOINT_URL": url,
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    try:
        yield S3Server(url, environment, stop is None)
    finally:
        if stop is not None:
            stop()
