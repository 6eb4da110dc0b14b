"""The code of gradproj/training/README.md gives the results that the page describes."""

import re
from pathlib import Path

import numpy as np
import pytest
from helpers.corpora import make_corpus, mixed_documents
from helpers.models import make_model

import gradproj
from gradproj import ProjectionStore
from gradproj.training import METHODS

PAGE = (Path(gradproj.__file__).parent / "training" / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """The names that are left after all blocks ran in order."""
    folder, methods = tmp_path_factory.mktemp("readme"), dict(METHODS)
    make_model(folder / "demo" / "model", "gpt2")
    make_corpus(folder / "demo" / "tars", mixed_documents(20))
    names = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in BLOCKS:
            exec(block, names)
    METHODS.clear()
    METHODS.update(methods)
    return names | {"folder": folder}


def test_loop_of_ones_own_leaves_a_row_of_every_sample(names):
    with ProjectionStore(names["folder"] / "run" / "projections") as store:
        assert store.array("sample_id").tolist() == list(range(12))
    assert names["steps"].tolist() == np.repeat([1, 2, 3, 4], 3).tolist()
    assert names["first"].shape == (3, 8 * 256)
    assert np.isfinite(names["first"]).all()


def test_engine_used_directly_sums_a_value_for_every_sample(names):
    assert set(names["values"]) == set(range(9))
    assert names["products"]["total"].shape == (3,)


def test_trainer_callback_leaves_the_rows_of_every_step(names):
    with ProjectionStore(names["folder"] / "watched" / "projections") as store:
        assert store.array("step").tolist() == [1, 1, 2, 2]


def test_new_engine_runs_in_the_loop_by_one_entry(names):
    lines = (names["folder"] / "hardest" / "hardest.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["1", "2", "3"]
