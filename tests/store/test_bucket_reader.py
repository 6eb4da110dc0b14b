"""Reading a store in a bucket: the laws of any store, and what is asked of the bucket."""

import pytest
from helpers.buckets import copy_into, memory_path
from helpers.reader_laws import ReaderLaws


class TestStoreInABucket(ReaderLaws):
    @pytest.fixture
    def put(self):
        place = memory_path("out")
        return lambda path: copy_into(path, place)
