"""Addresses: parsed, joined, shown; no credentials in them or in a message."""

from pathlib import Path

import pytest

from gradproj.corpus.tar.paths import list_tars
from gradproj.errors import ConfigError, GradprojError
from gradproj.flags.paths import local_path, without_secret
from gradproj.storage.address import Address, is_remote, parse_location
from gradproj.store.metadata import find_store

SECRET = "aws-secret-zUq8"


@pytest.mark.parametrize(
    ("text", "bucket", "key"),
    [
        ("s3://bucket", "bucket", ""),
        ("s3://bucket/a//b/", "bucket", "a/b"),
        ("s3:/bucket/a", "bucket", "a"),
        ("gs://bucket/a b?c#d%20.tar", "bucket", "a b?c#d%20.tar"),
        ("AZ://container/x.tar", "container", "x.tar"),
        ("https://host:80/a%20b/x.tar", "host:80", "a b/x.tar"),
        ("hf://datasets/o/n@v1/data/x.tar", "datasets/o/n@v1", "data/x.tar"),
        ("hf://datasets/o/n", "datasets/o/n", ""),
    ],
)
def test_an_address_has_a_bucket_and_a_key_and_comes_back_as_text(text, bucket, key):
    assert is_remote(text)
    address = Address.parse(text)
    assert (address.bucket, address.key) == (bucket, key)
    assert Address.parse(str(address)) == address


@pytest.mark.parametrize(
    "text", ["x.tar", "/a/b", "hf:NAME", "hf:/folder", "c:/x", "file:///x", ""]
)
def test_a_path_is_no_address(text):
    assert not is_remote(text)
    assert parse_location(text) == Path(text)


@pytest.mark.parametrize(
    "text",
    [
        f"s3://user:{SECRET}@bucket/x",
        f"https://{SECRET}@host/x.tar",
        f"https://host/x.tar?X-Amz-Signature={SECRET}",
        f"https://host/x.tar?sv=2024&sig={SECRET}",
        f"https://host/x.tar?{SECRET}",
        f"s3://key:{SECRET[:4]}/{SECRET}@bucket/x",
        f"https://user:{SECRET[:4]}/{SECRET}@host/x",
        f"hf://datasets/user:{SECRET}@org/name/x.tar",
        f"hf://datasets/org/name/x.tar?token={SECRET}",
        f"s3://bucket/x.tar?a=b&X-Amz-Signature={SECRET}",
        f"ftp://user:{SECRET}@host/x",
    ],
)
def test_credentials_in_an_address_are_refused_and_never_shown(text):
    for refuse in (Address.parse, local_path, list_tars, find_store):
        with pytest.raises(GradprojError, match=r"credential|signature|query|no address") as error:
            refuse(text)
        assert SECRET not in str(error.value)
    assert SECRET not in without_secret(text)


@pytest.mark.parametrize("text", ["s3://b/shard-?token.tar", "gs://b/a@b:c?.tar", "x@y:z?sig=1"])
def test_names_that_only_look_like_secrets_are_taken(text):
    assert str(parse_location(text)) == without_secret(text) == text


@pytest.mark.parametrize("text", ["s3://", "s3:///x", "hf://o/n/x.tar", "s3://b/../x", "x.tar"])
def test_what_names_no_object_is_refused(text):
    with pytest.raises(ConfigError):
        Address.parse(text)


def test_an_address_behaves_like_a_path():
    folder = Address.parse("s3://bucket/a")
    tar = folder / "b" / "c.tar"
    assert (str(tar), tar.name, tar.suffix) == ("s3://bucket/a/b/c.tar", "c.tar", ".tar")
    assert tar.parent == folder / "b"
    assert tar.with_name("d.tar") == folder / "b/d.tar"
    assert tar.is_relative_to(folder)
    assert str(tar.relative_to(folder)) == "b/c.tar"
    assert not tar.is_relative_to(Address.parse("s3://bucket/a/bb"))
    assert not tar.is_relative_to(Path("a"))
