"""Imports go one way, and each outside library has its one place."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gradproj"

LEVELS = [
    {"formatting", "kernels"},
    {"errors"},
    {"files", "flags", "distributed"},
    {"corpus", "model"},
    {"store"},
    {"engine", "coordinator"},
    {"analysis"},
    {"job"},
    {"query", "training", "maintenance", "run"},
    {"report", "evaluation"},
    {"cli", "examples", "__main__", "__init__"},
]
"""A stage imports only from itself and from the levels before its own."""

LEVEL_OF = {stage: number for number, stages in enumerate(LEVELS) for stage in stages}

HOME_OF = {
    "zarr": {"store"},
    "numcodecs": {"store"},
    "webdataset": {"corpus"},
    "datasets": {"corpus"},
    "pyarrow": {"corpus"},
    "huggingface_hub": {"model"},
    "transformers": {"kernels", "model", "engine", "training"},
    "tokenizers": {"training"},
    "bm25s": {"evaluation"},
    "kronfluence": {"evaluation"},
    "xarray": {"store", "examples"},
    "dask": {"store", "examples"},
    "matplotlib": {"training", "report"},
    "jinja2": {"report"},
}


def stage_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # `from gradproj.store import layout` imports the module gradproj.store.layout.
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    stage = stage_of(path)
    assert stage in LEVEL_OF, f"stage {stage} has no level"
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "gradproj" and len(parts) > 1 and parts[1] != stage and stage != "__init__":
            assert LEVEL_OF[parts[1]] < LEVEL_OF[stage], (
                f"{stage} imports {parts[1]}, which is not below it"
            )


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_each_outside_library_has_its_one_place(path):
    for name in imports_of(path):
        homes = HOME_OF.get(name.split(".")[0])
        assert homes is None or stage_of(path) in homes, (
            f"{stage_of(path)} imports {name}; its place is {homes}"
        )


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_dist_reads_the_environment_and_only_the_engine_registers_hooks(path):
    names = {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }
    stage = stage_of(path)
    if stage not in ("distributed", "kernels", "training"):
        assert not names & {"environ", "getenv"}
    if stage not in ("engine", "training"):
        assert not {name for name in names if name.startswith("register_forward")}
