"""Cost of a job's documents as texts, as token ids in JSON, and as arrays tokenized ahead.

    python tests/bench/bench_tokenized.py [--quick]

Each side reads all documents from its tars and makes their token sequences, as a rank does before
the engine sees them, in one process with one thread. Printed are CPU seconds, ratios and bytes. The
other table is `prepare` itself: without a tokenizer, and with one.
"""

import argparse
import json
import os
import tempfile
import time
from itertools import islice
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # before transformers is imported

from documents import make_documents
from measure import Variant, interleave, print_machine, print_table
from transformers import PreTrainedTokenizerFast

from gradproj.corpus.index import CorpusIndex
from gradproj.corpus.index_file import open_corpus
from gradproj.corpus.prepare import prepare
from gradproj.corpus.prepare_config import PrepareConfig
from gradproj.corpus.stream import read_documents
from gradproj.corpus.tar.writer import TarSequence
from gradproj.model.ahead_config import AheadConfig
from gradproj.model.document_tokens import DocumentRules, DocumentTokenizer
from gradproj.model.tokenize_ahead import TokenizeAhead

MAX_LENGTH = 2048
AT_ONCE = 256


def sequences(index: CorpusIndex, tokenizer: DocumentTokenizer) -> list[bytes]:
    """Return the token ids of every document's sequences."""
    found = []
    stream = read_documents(index, 0, index.n_samples)
    while documents := list(islice(stream, AT_ONCE)):
        contents, weights = zip(*[(d.content, d.weight) for d in documents], strict=True)
        for document in tokenizer.sequences(contents, weights):
            found += [sequence.ids.tobytes() for sequence in document.sequences]
    return found


def write_json_ids(folder: Path, index: CorpusIndex, tokenizer: DocumentTokenizer) -> None:
    """Write the documents as ``{"input_ids": [...]}``."""
    folder.mkdir()
    tars = TarSequence(folder, 10_000)
    for document in read_documents(index, 0, index.n_samples):
        assert document.content is not None
        (made,) = tokenizer.sequences([document.content], [1.0])
        ids = made.sequences[0].ids.tolist() if made.sequences else []
        tars.add({"json": json.dumps({"input_ids": ids}).encode()})
    tars.end_tar()


def n_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.tar"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="500 documents, 2 rounds")
    args = parser.parse_args()
    n_documents, rounds = (500, 2) if args.quick else (4000, 5)
    print_machine("tokenizers", "numpy")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        documents = make_documents(folder, n_documents)
        ahead = AheadConfig(tokenizer=str(folder / "tokenizer"), processes=1)
        numbers = iter(range(1000))

        def prepare_texts(tokenizer: TokenizeAhead | None = None) -> Path:
            out = folder / f"tars{next(numbers)}"
            config = PrepareConfig(inputs=(str(documents),), output_dir=str(out))
            prepare(config, progress=False, tokenizer=tokenizer)
            return out

        fast = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
        tokenizer = DocumentTokenizer(fast, "tokenizer", DocumentRules(), MAX_LENGTH)
        tars = {"texts": prepare_texts(), "arrays": prepare_texts(TokenizeAhead(ahead, 0))}
        indexes = {side: open_corpus(str(path), progress=False) for side, path in tars.items()}
        tars["JSON ids"] = folder / "json"
        write_json_ids(tars["JSON ids"], indexes["texts"], tokenizer)
        indexes["JSON ids"] = open_corpus(str(tars["JSON ids"]), progress=False)
        want = sequences(indexes["texts"], tokenizer)
        assert all(sequences(index, tokenizer) == want for index in indexes.values())
        print(f"\n{n_documents:,} documents, {sum(map(len, want)) // 8:,} tokens")
        for side, path in tars.items():
            print(f"  {side:9} {n_bytes(path) / 1e6:6.1f} MB of tars")
        print("\nReading, seconds of CPU")
        sides = {
            side: Variant(lambda index=index: sequences(index, tokenizer))  # type: ignore[misc]
            for side, index in indexes.items()
        }
        print_table(interleave(sides, rounds, time.process_time), ["texts", "arrays"])
        print("\nprepare, seconds of CPU")
        writers = {
            "of texts": Variant(prepare_texts),
            "--tokenizer": Variant(lambda: prepare_texts(TokenizeAhead(ahead, 0))),
        }
        print_table(interleave(writers, rounds, time.process_time), ["of texts"])


if __name__ == "__main__":
    main()
