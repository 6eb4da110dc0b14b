"""The table of flags in job/README.md agrees with the flags and with the identity."""

import dataclasses
import re
from pathlib import Path

import pytest

import gradproj.job
from gradproj.flags import flag_of
from gradproj.job.config import RunConfig, run_config
from gradproj.job.identity import FORMAT_1, identity_of_flags
from gradproj.store.layout import plan_layout

README = Path(gradproj.job.__file__).with_name("README.md").read_text()
SECTION = README.split("## Flags that change the bits of a row")[1].split("\n## ")[0]
TABLE = [
    (re.findall(r"`(--\w+)`", flags), effect.strip(), identity.strip())
    for flags, effect, identity in re.findall(r"^\| (`--.*?) \| (.*?) \| (.*?) \|$", SECTION, re.M)
]
REQUIRED = ["--shards", "tars", "--model", "m", "--output_dir", "out", "--encoding", "dense"]
REQUIRED += ["--head_rows", "9x9"]


def listed(word):
    return {flag for flags, _, identity in TABLE if identity.startswith(word) for flag in flags}


def identity_of(*argv):
    config = run_config([*REQUIRED, *argv], "test")
    n_samples = config.corpus.max_samples or 100
    return FORMAT_1 | identity_of_flags(config, plan_layout(n_samples, [4], 8, config.store))


def test_table_lists_every_flag_once():
    flags = [flag for row in TABLE for flag in row[0]]
    sections = [section.type for section in dataclasses.fields(RunConfig)]
    assert sorted(flags) == sorted(
        f"--{flag_of(f)}" for s in sections for f in dataclasses.fields(s)
    )


def test_compared_flags_are_the_keys_of_the_identity():
    assert listed("compared") == set(identity_of())


OTHER_VALUES = {
    "--proj_layers": "attn", "--proj_rank_total": 64, "--proj_rank_min": 4, "--proj_seed": 1,
    "--proj_kind": "gaussian", "--basis": "random", "--pilot_tokens": 99, "--head_rows": "8x8",
    "--head_damping": 0.1,
    "--include_embeddings": None, "--experts": "separate", "--max_length": 32,
    "--long_documents": "windows", "--loss_reduction": "mean", "--special_tokens": "bos",
    "--model_dtype": "bfloat16", "--revision": "v2", "--proj_dtype": "float32",
    "--hidden_state": "mean",
    "--encoding": "signs", "--compressor": "zstd", "--rows_per_shard": 32, "--max_samples": 50,
    "--domains": "Github",
    "--max_document_bytes": 1000, "--max_json_depth": 5, "--batch_size": 3, "--batch_tokens": 99,
    "--max_padding": 0.2,
    "--bytes_per_document": "5k", "--device": "cpu", "--threads": 1, "--deterministic": None,
    "--compile": None,
    "--gradient_checkpointing": None, "--output_dir": "other", "--proj_save_interval": 3,
    "--ranks_per_model": 2, "--offload": None,
    "--loss_on": "all", "--truncate_side": "left", "--preference_beta": 0.5,
    "--chat_template": __file__,
    "--quantize": "nf4", "--dequantize": None,
    "--anonymous": None, "--cache_dir": "cache", "--cache_gb": 2.0,
    "--verbose": None, "--allow_sparse": None, "--trust_remote_code": None, "--allow_pickle": None,
}  # fmt: skip


@pytest.mark.parametrize("flag", sorted(OTHER_VALUES))
def test_flag_changes_its_own_key_of_the_identity_or_none(flag):
    value = OTHER_VALUES[flag]
    before, after = identity_of(), identity_of(flag, *([] if value is None else [str(value)]))
    changed = {name for name in before if before[name] != after.get(name)}
    if flag == "--basis":  # a pilot belongs to one of its values
        changed -= {"--pilot_tokens"}
    if flag == "--encoding":  # a type belongs to dense rows
        changed -= {"--proj_dtype"}
    assert changed == ({flag} if flag in listed("compared") else set())


def test_all_other_flags_are_compared_by_fingerprint():
    # Covered by test_plan.py: other weights, tars and tokenizers are another identity.
    every = {flag for flags, _, _ in TABLE for flag in flags}
    assert listed("fingerprint") == every - set(OTHER_VALUES)
