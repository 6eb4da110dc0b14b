"""Imports go one way, and each outside library has its one place."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gradproj"

LEVELS = [
    {"formatting", "kernels"},
    {"errors"},
    {"files", "flags", "distributed"},
    {"storage"},
    {"corpus"},
    {"model", "store"},
    {"engine", "coordinator"},
    {"analysis"},
    {"job"},
    {"curvature", "query", "training", "maintenance", "run", "selection", "text"},
    {"report", "evaluation", "serve"},
    {"cli", "examples", "__main__", "__init__"},
]
"""A stage imports only from itself and from the levels before its own."""

MAX_LEVELS = 12
MAX_FILES_AT_THE_ROOT = 10

LEVEL_OF = {stage: number for number, stages in enumerate(LEVELS) for stage in stages}

HOME_OF = {
    "zarr": {"store"},
    "numcodecs": {"store"},
    "numba": {"kernels"},
    "llvmlite": {"kernels"},
    "webdataset": {"corpus"},
    "datasets": {"corpus"},
    "pyarrow": {"corpus"},
    "huggingface_hub": {"model", "storage"},
    "obstore": {"storage"},
    "botocore": {"storage"},
    "transformers": {"kernels", "model", "engine", "training"},
    "tokenizers": {"training"},
    "bm25s": {"evaluation"},
    "kronfluence": {"evaluation"},
    "xarray": {"store", "examples"},
    "dask": {"store", "examples"},
    "matplotlib": {"training", "report", "evaluation"},
    "jinja2": {"report", "model"},
    "starlette": {"serve"},
    "uvicorn": {"cli"},
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


def test_modules_do_not_import_each_other_in_a_circle():
    """Imports inside functions and for type checks count too."""
    modules = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(
            ".__init__"
        ): path
        for path in FILES
    }
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                # `from package import module` imports the module, nothing of the package's own.
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                graph[name] |= {n if n in modules else f"{node.module}" for n in names}
    TopologicalSorter(graph).prepare()  # a CycleError lists the modules


def test_package_has_few_levels_and_few_files_at_its_root():
    assert len(LEVELS) <= MAX_LEVELS
    assert len(list(PACKAGE.glob("*.py"))) <= MAX_FILES_AT_THE_ROOT
    assert {stage_of(path) for path in FILES} == LEVEL_OF.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_each_outside_library_has_its_one_place(path):
    for name in imports_of(path):
        homes = HOME_OF.get(name.split(".")[0])
        assert homes is None or stage_of(path) in homes, (
            f"{stage_of(path)} imports {name}; its place is {homes}"
        )


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_environment_and_hooks_are_used_in_few_packages(path):
    names = {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }
    stage = stage_of(path)
    if stage not in ("cli", "distributed", "kernels", "storage"):
        assert not names & {"environ", "getenv"}
    if stage not in ("engine", "training"):
        assert not {name for name in names if name.startswith("register_forward")}
