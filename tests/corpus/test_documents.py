"""The three ways to read a sample's domain agree on valid JSON."""

import json
import random

import pytest
from helpers.corpora import slow_domain

from gradproj.corpus.documents import DomainReader
from gradproj.errors import ConfigError

FIELD = "meta.pile_set_name"


def random_value(rng: random.Random, depth: int = 0):
    kinds = ["text", "text", "number", "none", "meta", "list", "object"] if depth < 4 else ["text"]
    kind = rng.choice(kinds)
    if kind == "text":
        return rng.choice(
            [
                "",
                "X",
                "Y\u2028",
                '"meta": {"pile_set_name": "Z"}}',
                "\\",
                '\\"',
                '{"',
                "é",
                "x" * 500,
            ]
        )
    if kind == "number":
        return rng.choice([0, -1, 1.5, 1e300, float("nan"), float("-inf"), 10**30, True])
    if kind == "none":
        return None
    if kind == "list":
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(3))]
    names = ["text", "meta", "pile_set_name", "a,", '{"meta', "x\\"]
    if kind == "meta":
        return {rng.choice(["meta", "pile_set_name"]): random_value(rng, depth + 1)}
    return {rng.choice(names): random_value(rng, depth + 1) for _ in range(rng.randrange(5))}


@pytest.mark.parametrize("field", [FIELD, "meta", "meta.meta.pile_set_name"])
def test_domain_equals_the_one_from_decoding_the_whole_document(field):
    rng = random.Random(3)
    domain_of = DomainReader(field)
    n_named = 0
    for _ in range(6000):
        value = random_value(rng)
        if rng.random() < 0.7:
            value = {"text": random_value(rng), "meta": random_value(rng)}
        if rng.random() < 0.3:
            value = {
                "text": random_value(rng),
                "meta": {"meta": {"pile_set_name": random_value(rng, 4)}},
            }
        if isinstance(value, dict) and rng.random() < 0.2:  # an object written as a string
            value["meta"] = json.dumps(value.get("meta"))
        separators = rng.choice([None, (",", ":"), (", ", ":  ")])
        data = json.dumps(value, ensure_ascii=rng.random() < 0.5, separators=separators).encode()
        if (
            value and isinstance(value, dict) and rng.random() < 0.2
        ):  # a name twice: the last one counts
            data = data[:-1] + b', "meta": ' + json.dumps(random_value(rng)).encode() + b"}"
        want = slow_domain(data, tuple(field.split(".")))
        n_named += want != "unknown"
        for _ in range(2):  # the second time from what was remembered
            assert domain_of(data) == want, data
    assert n_named > 50


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b'{"text": "\xff\xfe", "z": 1}',
        b'{"meta": {"pile_set_name": "X"}, "text": "\xff"}',
        b"[" * 100_000,
        b'{"meta":' * 5000 + b"1" + b"}" * 5000,
        b"\0",
        b"nul",
    ],
)
def test_undecodable_document_belongs_to_the_unknown_domain(data):
    assert DomainReader(FIELD)(data) == "unknown"


def test_empty_part_of_domain_field_is_rejected():
    with pytest.raises(ConfigError, match=r"--domain_field is 'meta\.\.x'"):
        DomainReader("meta..x")
