"""Tokenize documents ahead of a job, in several processes: the stage of ``prepare --tokenizer``.

A sample's members are read as the job reads them and tokenized by the job's own code, so its token
ids and labels are those that the job would make of the text.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from queue import SimpleQueue
from typing import Any, BinaryIO

import msgspec
import numpy as np

from gradproj.corpus.content import IGNORE, Preference, TokenIds, content_of
from gradproj.corpus.documents import ReadLimits, fields_of_members
from gradproj.corpus.messages import BadContentError
from gradproj.corpus.packing import token_members
from gradproj.corpus.prepare import Members
from gradproj.errors import CorpusError
from gradproj.model.ahead_config import AheadConfig
from gradproj.model.checkpoint import fetch
from gradproj.model.config import ModelConfig
from gradproj.model.document_tokens import DocumentTokenizer
from gradproj.model.fingerprint import tokenization_of
from gradproj.model.sequences import TokenSequence
from gradproj.model.tokenizer_loading import load_tokenizer

_SMALL_BYTES = 8 * 2**20
"""Inputs that one process tokenizes before others have started."""
_WORKER = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from gradproj.model.tokenize_ahead import run_worker; run_worker()"
)


def _load(config: AheadConfig) -> Any:
    # Any architecture works here: only the tokenizer's files are used.
    model = ModelConfig(
        architecture="GPT2-Small",
        init="random",
        tokenizer=config.tokenizer,
        special_tokens=config.special_tokens,
        trust_remote_code=config.trust_remote_code,
    )
    return load_tokenizer(fetch(model))


class TokenizeAhead:
    """Tokenizes batches of samples, in their order, in one process or in several.

    Args:
        config: with a tokenizer.
        n_bytes: size of the inputs; None if not known.
    """

    def __init__(self, config: AheadConfig, n_bytes: int | None) -> None:
        tokenizer = _load(config)
        rules, special = config.rules, config.special_tokens
        self._config = config
        self._documents = _document_tokenizer(tokenizer, config)
        self.tokenization = tokenization_of(tokenizer, special, rules, config.tokenizer)
        is_small = n_bytes is not None and n_bytes < _SMALL_BYTES
        self.n_processes = config.processes or (1 if is_small else len(os.sched_getaffinity(0)))

    def __call__(self, batches: Iterator[list[Members]]) -> Iterator[list[Members | str]]:
        """Yield each batch with token ids in place of texts; a string is a sample's problem."""
        if self.n_processes == 1:
            return (tokenize_samples(self._documents, batch) for batch in batches)
        return _in_processes(batches, self._config, self.n_processes)


def _document_tokenizer(tokenizer: Any, config: AheadConfig) -> DocumentTokenizer:
    # Documents are kept whole: --max_length and --truncate_side are the job's.
    return DocumentTokenizer(
        tokenizer, config.special_tokens, config.rules, max_length=0, vocabulary=len(tokenizer)
    )


def tokenize_samples(documents: DocumentTokenizer, samples: list[Members]) -> list[Members | str]:
    """Return samples with token ids in place of texts, or the problem with a sample.

    Token ids stay as they are, and so do preferences, which are two sequences.
    """
    results: list[Members | str] = list(samples)
    contents, places, rest = [], [], []
    for place, members in enumerate(samples):
        try:
            fields = fields_of_members(members, ReadLimits())
            content, _ = content_of(fields)
        except BadContentError as bad:
            results[place] = str(bad)
            continue
        kept: dict[str, Any] = {name: fields[name] for name in ("weight", "meta") if name in fields}
        if content.is_empty():
            results[place] = token_members(kept, np.zeros(0, np.int64), None)
            continue
        contents.append(content)
        places.append(place)
        rest.append(kept)
    tokenized = documents.sequences(contents, [1.0] * len(contents))
    for place, content, kept, document in zip(places, contents, rest, tokenized, strict=True):
        if document.problem:
            results[place] = document.problem
        elif not isinstance(content, Preference | TokenIds):
            (sequence,) = document.sequences
            results[place] = token_members(kept, sequence.ids, _labels_of(sequence))
    return results


def _labels_of(sequence: TokenSequence) -> np.ndarray | None:
    """Return labels, int32; None if every token but the first is a target."""
    if sequence.is_target[1:].all():
        return None
    return np.where(sequence.is_target, sequence.ids, IGNORE).astype(np.int32)


# ---- Processes


class _Worker:
    """A process that tokenizes one batch after the other."""

    def __init__(self, settings: bytes) -> None:
        # A worker uses one CPU: its tokenizer starts no threads of its own.
        command = ["env", "TOKENIZERS_PARALLELISM=false", sys.executable, "-c", _WORKER]
        self._process = subprocess.Popen(
            [*command, json.dumps(sys.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdin is not None
        _send(self._process.stdin, settings)

    def ask(self, batch: list[Members]) -> list[Members | str]:
        """Return the tokenized batch.

        Raises:
            CorpusError: the process has ended.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        answer = None
        with contextlib.suppress(BrokenPipeError):
            _send(stdin, msgspec.msgpack.encode(batch))
            answer = _receive(stdout)
        if answer is None:
            raise CorpusError(
                f"a process that tokenized ended (exit code {self._process.wait()}); was it out of "
                "memory? Give fewer --processes"
            )
        return msgspec.msgpack.decode(answer, type=list[dict[str, bytes] | str])

    def end(self) -> None:
        self._process.kill()
        # Closing its pipe may flush what it no longer reads.
        with contextlib.suppress(BrokenPipeError), self._process:
            pass


def _in_processes(
    batches: Iterator[list[Members]], config: AheadConfig, n_processes: int
) -> Iterator[list[Members | str]]:
    """Yield the tokenized batches in their order; a thread waits for each process."""
    settings = msgspec.msgpack.encode(asdict(config))
    with contextlib.ExitStack() as stack:
        idle: SimpleQueue[_Worker] = SimpleQueue()
        threads = stack.enter_context(ThreadPoolExecutor(n_processes))
        for _ in range(n_processes):
            worker = _Worker(settings)
            # Before the threads are waited for, which wait for it.
            stack.callback(worker.end)
            idle.put(worker)

        def ask(batch: list[Members]) -> list[Members | str]:
            worker = idle.get()
            try:
                return worker.ask(batch)
            finally:
                idle.put(worker)

        waiting: deque[Future[list[Members | str]]] = deque()
        for batch in batches:
            waiting.append(threads.submit(ask, batch))
            if len(waiting) > 2 * n_processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def run_worker() -> None:
    """Run a worker: settings, then batches from standard input, an answer to each."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    stdin = sys.stdin.buffer
    config = AheadConfig(**msgspec.msgpack.decode(_receive(stdin) or b""))
    documents = _document_tokenizer(_load(config), config)
    while (batch := _receive(stdin)) is not None:
        samples = msgspec.msgpack.decode(batch, type=list[dict[str, bytes]])
        try:
            _send(out, msgspec.msgpack.encode(tokenize_samples(documents, samples)))
        except BrokenPipeError:
            os._exit(1)  # the parent is gone, however it ended


def _send(file: BinaryIO | Any, content: bytes) -> None:
    file.write(len(content).to_bytes(8, "little") + content)
    file.flush()


def _receive(file: BinaryIO | Any) -> bytes | None:
    """Return the next message; None if the other side has ended."""
    head = file.read(8)
    content = file.read(int.from_bytes(head, "little")) if len(head) == 8 else b""
    return content if len(head) == 8 and len(content) == int.from_bytes(head, "little") else None
