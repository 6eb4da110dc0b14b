"""The command ``serve``: outputs in a browser, and a JSON API, until it is interrupted."""

import atexit
import functools
import importlib.util
import ipaddress
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gradproj.cli.query.checkpoints import titles_of
from gradproj.cli.score_args import print_note
from gradproj.cli.serve.explorer import OutputExplorer
from gradproj.errors import ConfigError, GradprojError
from gradproj.flags import flag, parse
from gradproj.job.recorded_args import RecordedRunArgs

MIN_TOKEN = 16
TOKEN_VARIABLE = "GRADPROJ_TOKEN"


@dataclass(frozen=True, kw_only=True)
class ServeConfig(RecordedRunArgs, title="serve"):
    """The outputs, the address, the clients and the limits."""

    others: tuple[str, ...] = flag(
        "Further outputs, to be asked side by side.",
        (),
        name="OUTPUT2",
        positional=True,
        path="DIR",
        remote=True,
    )
    host: str = flag(
        "Address or name to listen at. With another than this machine's own every request needs a "
        "token.",
        "127.0.0.1",
        metavar="HOST",
    )
    port: int = flag("Port; 0 = any that is free.", 8765, minimum=0, maximum=65535)
    token: str = flag(
        f"Secret of at least {MIN_TOKEN} characters that requests must have; auto: a new one, "
        f"which is printed. Default: that of the environment's {TOKEN_VARIABLE}, which no list of "
        "processes shows; else none for this machine alone, and auto otherwise.",
        "",
        metavar="auto|TEXT",
    )
    allow_host: tuple[str, ...] = flag(
        "Host names under which browsers may reach the server, besides the one of --host.",
        (),
        metavar="NAME",
    )
    max_scans: int = flag("Scans at once.", 2, minimum=1)
    max_queue: int = flag("Scans that may wait.", 64, minimum=0)
    time_limit_s: float = flag("Longest time of one scan.", 600.0, above=0)
    max_query_characters: int = flag("Longest query.", 100_000, minimum=1)
    log_queries: bool = flag("Write the questions, too, to the log on standard error.", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        name = "--token" if self.token else TOKEN_VARIABLE
        if self.given_token not in ("", "auto") and len(self.given_token) < MIN_TOKEN:
            raise ConfigError(f"{name} has fewer than {MIN_TOKEN} characters; auto makes one")
        if not all("!" <= c <= "~" for c in self.given_token):
            raise ConfigError(f"{name} has blanks or is not ASCII; auto makes one")
        moved = [f"--{x}" for x in ("model", "tokenizer", "shards") if getattr(self, x)]
        if self.others and moved:
            raise ConfigError(f"with several outputs, leave {moved[0]} out: it is of one")

    @property
    def given_token(self) -> str:
        """The secret of the flag or of the environment; empty for neither."""
        return self.token or os.environ.get(TOKEN_VARIABLE, "")

    @property
    def outputs(self) -> list[str]:
        """All outputs, in the order given."""
        return [self.output, *self.others]


def serve_command(argv: list[str]) -> None:
    """``python -m gradproj serve OUTPUT``"""
    (config,) = parse(
        argv,
        "gradproj serve",
        ServeConfig,
        description="Answer queries of stores in a browser and as JSON. Model, curvature and store "
        "are opened once.",
    )
    config.apply()
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"serve needs {' and '.join(missing)}: pip install 'gradproj[serve]' brings both"
        )
    serve(config)


def explorers_of(config: ServeConfig) -> list[OutputExplorer]:
    """Return an explorer of each output; raises if one has no store."""
    names = [f.name for f in RecordedRunArgs.__dataclass_fields__.values()]
    given: dict[str, Any] = {name: getattr(config, name) for name in names}
    made = []
    titles = titles_of(config.outputs) if config.others else [config.output.rstrip("/")]
    for output, title in zip(config.outputs, titles, strict=True):
        inputs = RecordedRunArgs(**{**given, "output": output})
        explorer = OutputExplorer(inputs, title, config.max_query_characters)
        explorer.facts()
        made.append(explorer)
    return made


def serve(config: ServeConfig) -> None:
    """Serve until the process is interrupted.

    Raises:
        StoreError: an output has no store.
        ConfigError: the address cannot be listened at.
    """
    import uvicorn

    from gradproj.cli.serve import connections
    from gradproj.serve.app import Access, Server
    from gradproj.serve.guard import is_loopback
    from gradproj.serve.scans import ScanQueue

    explorers = explorers_of(config)
    local_only = is_loopback(config.host)
    token, is_new = config.given_token, False
    if token == "auto" or (not token and not local_only):
        token, is_new = secrets.token_urlsafe(24), True
    names = {config.host, *config.allow_host}
    if not local_only:
        names |= {socket.gethostname(), socket.getfqdn()}
    listener = _listener(config.host, config.port)
    queue = ScanQueue(config.max_scans, config.max_queue, config.time_limit_s)
    server = Server(explorers, queue, _log, config.log_queries)
    settings = connections.settings(server.app(Access(token, names, local_only)))
    load = functools.partial(_load, explorers)
    loader = threading.Thread(target=load, name="load", daemon=True)
    loader.start()
    address = f"http://{shown_host(config.host)}:{listener.getsockname()[1]}/"
    secret = f"#token={token}" if is_new else ""
    print(f"gradproj serves {len(explorers)} output(s) at {address}{secret}", flush=True)
    try:
        uvicorn.Server(settings).run(sockets=[listener])
    finally:
        if loader.is_alive():
            atexit.register(_end)


def _end() -> None:
    """End the process: torch aborts it if Python ends while one of its threads loads a model."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(130)  # as after any interrupt


def shown_host(host: str) -> str:
    """Return what a browser can open: of all interfaces, the name of this host."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.is_unspecified:
        return socket.gethostname()
    return f"[{host}]" if address.version == 6 else host


def _load(explorers: Sequence[OutputExplorer]) -> None:
    """Load what answers need, output by output; what is wrong will show in an answer, too."""
    for explorer in explorers:
        started = time.monotonic()
        try:
            explorer.load()
        except (GradprojError, OSError) as error:
            print_note(f"{explorer.title} cannot be asked: {error}")
        else:
            print_note(f"{explorer.title} is loaded, after {time.monotonic() - started:.1f} s")


def _listener(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)  # who comes before the server has begun waits
    except OSError as error:
        raise ConfigError(
            f"--host {host} --port {port} cannot be listened at: {error}; --port 0 takes any port"
        ) from error
    return listener


def _log(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)
