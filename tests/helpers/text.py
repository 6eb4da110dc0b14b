"""The text score computed the obvious way, and the tokens of the finished job's documents."""

import math
from collections import Counter

from helpers.corpora import mixed_documents
from helpers.outputs import EMPTY, N_SAMPLES, ONE_TOKEN, SETTINGS
from transformers import AutoTokenizer


def ngrams(tokens, first=0):
    """Count the runs of 1 to 4 tokens that end at ``first`` or later."""
    return Counter(
        tuple(tokens[end - n : end])
        for end in range(first + 1, len(tokens) + 1)
        for n in range(1, 5)
        if n <= end
    )


def text_score(query, document, documents, first=0):
    """Return ``K`` of a query and one of the documents, all lists of token ids."""
    counts, total = ngrams(document), 0.0
    for ngram, n in ngrams(query, first).items():
        if ngram in counts:
            df = sum(ngram in ngrams(other) for other in documents)
            total += n * counts[ngram] * math.log(len(documents) / df + 1) ** 3
    return total


def job_tokens(job):
    """Return sample id -> tokens of the finished job's documents that have a row."""
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    texts = [document["text"] for document in mixed_documents(N_SAMPLES)]
    return {
        i: tokenizer(text).input_ids[: SETTINGS["max_length"]]
        for i, text in enumerate(texts)
        if i not in (EMPTY, ONE_TOKEN)
    }
