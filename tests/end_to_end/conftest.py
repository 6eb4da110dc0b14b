"""One model and one corpus for all jobs of a session."""

import pytest
from helpers.corpora import make_corpus, mixed_documents
from helpers.models import make_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """200 documents in 5 tars: 13 units of 16 rows, the last one ragged."""
    return make_corpus(tmp_path_factory.mktemp("corpus"), mixed_documents(200))
