"""Flags and TOML files become dataclasses: names, lists, bounds, renamed flags, help."""

import dataclasses
import importlib
import os
import pkgutil
import re
import socket
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

import gradproj
from gradproj.corpus.config import CorpusConfig
from gradproj.errors import ConfigError
from gradproj.flags import Flags, current_names, flag, from_recorded, join_list, parse, split_list
from gradproj.flags.declaration import type_of


@dataclass(frozen=True, kw_only=True)
class Fruit(Flags, title="fruit"):
    where: str = flag("A place.", name="PLACE", positional=True)
    kinds: tuple[str, ...] = flag("Kinds.", ())
    only_parts: str = flag("Parts.", "peel", name="fruit_parts", comma_separated=True)
    number: int = flag("A number.", 0, minimum=2, maximum=9, why="a pair at least")
    share: float = flag("A share.", 0.5, above=0, below=1, renamed_from="fraction")
    colour: str = flag("A colour.", "", choices=("red", "green"))
    budget: int = flag("A budget.", 5, minimum=1, words={"auto": 0})
    ripe: bool = flag("Ripe ones only.", False, name="only_ripe")
    basket: str = flag("A basket.", "b", required="give a basket", metavar="NAME")
    stem: int = flag("Length of stems.", 30, words={"none": 0}, metavar="MM", default_text="long")
    shelf: str = flag("Where it lies.", "", path="DIR")
    lists: tuple[str, ...] = flag("What to buy.", (), path="FILE", streams=True)


@dataclass(frozen=True, kw_only=True)
class Shop(Flags, title="shop"):
    opens_at: int | None = flag("Hour of opening.", None, minimum=0, below=24)
    till: str = flag("The till.", "", group="money")


@dataclass(frozen=True, kw_only=True)
class Market(Shop, title="market"):
    stalls: int = flag("Number of stalls.", 1)
    owner: str = flag("The owner.", "", group="people", metavar="NAME")


def fruit(*argv):
    return parse(["here", *argv], "test", Fruit)[0]


def mistake(*argv):
    with pytest.raises(ConfigError) as refused:
        fruit(*argv)
    return str(refused.value)


# --- names ---


@pytest.mark.parametrize(
    "argv",
    [
        ["--fruit_parts", "peel", "--only_ripe"],
        ["--fruit-parts", "peel", "--only-ripe"],
        ["--fruit-parts=peel", "--only-ripe"],
    ],
)
def test_dashes_and_underscores_name_the_same_flag(argv):
    assert fruit(*argv) == Fruit(where="here", only_parts="peel", ripe=True)


def test_a_switch_is_turned_off_by_no_in_either_spelling():
    assert not fruit("--only_ripe", "--no-only-ripe").ripe
    assert not fruit("--only_ripe", "--no-only_ripe").ripe
    assert not fruit("--only_ripe", "--no_only_ripe").ripe


def test_dashes_in_values_stay():
    assert fruit("--basket=a-b", "--colour", "red").basket == "a-b"
    assert fruit("--basket", "only-ripe").basket == "only-ripe"


@pytest.mark.parametrize("old", ["--fraction", "--fraction=0.2"])
def test_the_old_name_of_a_flag_is_an_error_that_names_the_new_one(old):
    assert mistake(old, "0.2") == "--fraction is now called --share"


def test_an_unknown_flag_names_the_nearest():
    assert mistake("--colr", "red") == "unknown flag '--colr'; did you mean --colour?"


# --- lists ---


def test_lists_are_split_at_commas_and_a_repeated_flag_adds_to_the_list():
    assert fruit("--kinds", "apple, pear,").kinds == ("apple", "pear")
    assert fruit("--kinds", "apple", "--kinds", "pear").kinds == ("apple", "pear")
    assert fruit("--fruit_parts", "peel", "--fruit_parts", "seed").only_parts == "peel,seed"


def test_an_optional_list_of_places_stands_before_the_flags():
    @dataclass(frozen=True, kw_only=True)
    class Route(Fruit, title="route"):
        stops: tuple[str, ...] = flag("Further places.", (), name="STOP", positional=True)
        prices: tuple[float, ...] = flag("Prices.", ())

    def route(*argv):
        return parse(argv, "test", Route)[0]

    assert (route("here").where, route("here").stops, route("here").prices) == ("here", (), ())
    got = route("here", "a,b", "c", "--prices", "-2,1e-3", "--number", "3", "--prices=4")
    assert (got.where, got.stops, got.prices) == ("here", ("a,b", "c"), (-2.0, 1e-3, 4.0))
    with pytest.raises(ConfigError, match="prices: invalid list of float value: '1,x'"):
        route("here", "--prices", "1,x")
    with pytest.raises(ConfigError, match="unexpected argument 'c'; --kinds takes one list"):
        route("here", "a", "--kinds", "b", "c")
    with pytest.raises(ConfigError, match=r"required: PLACE$"):
        route("--number", "3")


def test_a_backslash_keeps_a_comma_in_an_item():
    assert fruit("--kinds", r"apple\, red,pear").kinds == ("apple, red", "pear")


@pytest.mark.parametrize("items", [(), ("a",), ("a", "b,c", ",")])
def test_joined_lists_split_into_the_same_items(items):
    assert split_list(join_list(items)) == items


@pytest.mark.parametrize("name", ["kinds", "fruit_parts"])
def test_a_second_bare_word_is_an_error_that_says_how_lists_are_written(name):
    assert mistake(f"--{name}", "apple", "pear") == (
        f"unexpected argument 'pear'; --{name} takes one list with commas: --{name} A,B"
    )


def test_a_glob_that_the_shell_expanded_is_an_error_that_says_to_quote_it():
    with pytest.raises(ConfigError, match=r"takes one value: quote .*--shards 'tars/\*\.tar'\)"):
        parse(["--shards", "tars/a.tar", "tars/b.tar"], "gradproj plan", CorpusConfig)


@pytest.mark.parametrize("text", ["", " , "])
def test_an_empty_list_is_refused(text):
    assert mistake("--kinds", text).startswith("--kinds is empty; give a list")


# --- TOML ---


def test_toml_takes_lists_words_and_names_with_dashes(tmp_path):
    path = tmp_path / "flags.toml"
    path.write_text(
        'kinds = "apple,pear"\nfruit-parts = ["peel", "a,b"]\nbudget = "auto"\nshare = 0.25\n'
    )
    got = fruit("--config", str(path), "--share", "0.75")
    assert got == Fruit(
        where="here", kinds=("apple", "pear"), only_parts=r"peel,a\,b", budget=0, share=0.75
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("fraction = 0.1", "unknown key 'fraction'; it is now called 'share'"),
        ("colr = 'red'", "unknown key 'colr'; did you mean colour?"),
        ("number = 'two'", "number must be one int, got 'two'"),
        ("kinds = [1]", r"kinds must be a list of str, got \[1\]"),
        ("number = 1", "--number must be from 2 to 9, got 1"),
    ],
)
def test_a_wrong_line_of_toml_is_named(tmp_path, line, message):
    path = tmp_path / "flags.toml"
    path.write_text(line)
    with pytest.raises(ConfigError, match=message):
        fruit("--config", str(path))


# --- checks ---


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"number": 1}, "--number must be from 2 to 9, got 1 (a pair at least)"),
        ({"number": 10}, "--number must be from 2 to 9, got 10 (a pair at least)"),
        ({"share": 0.0}, "--share must be more than 0 and less than 1, got 0.0"),
        ({"share": float("nan")}, "--share must be more than 0 and less than 1, got nan"),
        ({"colour": "blue"}, "--colour is 'blue'; choose one of red, green"),
        ({"budget": -1}, "--budget must be at least 1, or auto, got -1"),
        ({"basket": " "}, "--basket is empty; give a basket"),
        ({"basket": []}, "--basket is empty; give a basket"),
        ({"number": "5"}, "--number must be one int, got '5'"),
    ],
)
def test_a_dataclass_built_in_python_is_checked_as_well(wrong, message):
    with pytest.raises(ConfigError) as refused:
        Fruit(where="here", **wrong)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("file:///data/a%20b", "/data/a b"),
        ("file://localhost/data", "/data"),
        ("file:/data", "/data"),
        ("a:b/c", "a:b/c"),
        ("hf:/data", "hf:/data"),
        ("./s3://x", "./s3://x"),
        ("", ""),
    ],
)
def test_a_path_is_taken_as_it_is_or_from_its_file_address(text, path):
    assert fruit("--shelf", text).shelf == path
    assert fruit("--lists", f"x,{text}").lists == (("x", path) if path else ("x",))


@pytest.mark.parametrize(
    "address",
    [
        "s3://b/o",
        "S3://b",
        "gs://b",
        "hf://a/b",
        "https://huggingface.co/a/b",
        "s3:/b",
        "file://h/x",
    ],
)
def test_an_address_is_no_path(address, tmp_path):
    for message in (mistake("--shelf", address), mistake("--lists", f"x,{address}")):
        assert f" {address} is an address, and only local paths are read and written" in message
        assert f"or write ./{address} if it is one" in message
    assert ("OWNER/NAME" in message) == ("hf" in address or "huggingface" in address)
    assert mistake("--config", address).startswith(f"--config {address} is an address")
    (tmp_path / "flags.toml").write_text(f"shelf = '{address}'")
    assert f"--shelf {address} is an address" in mistake("--config", str(tmp_path / "flags.toml"))
    assert mistake("--shelf", "pipe:cat a").endswith("commands are not run; give a local path")


def test_a_pipe_a_socket_and_a_device_are_named_unless_the_flag_reads_streams(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
    for path, kind in (
        (tmp_path / "fifo", "a FIFO (named pipe)"),
        (tmp_path / "socket", "a socket"),
        (Path(os.devnull), "a device"),
    ):
        assert mistake("--shelf", str(path)) == f"--shelf {path} is {kind}; give a file or folder"
        assert fruit("--lists", str(path)).lists == (str(path),)


def test_every_flag_of_a_path_is_declared_as_one():
    for module in pkgutil.walk_packages(gradproj.__path__, "gradproj."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    sections, fields = [Flags], {}
    for section in sections:
        sections += section.__subclasses__()
        if section.__module__.startswith("gradproj.") and dataclasses.is_dataclass(section):
            fields |= {f"{section.__name__}.{f.name}": f for f in dataclasses.fields(section)}
    words = re.compile(r"director(y|ies)|folder|file|tars\b", re.I)
    of_paths = {name for name, f in fields.items() if "path" in f.metadata}
    spoken_of = {
        name
        for name, f in fields.items()
        if type_of(f)[0] is str and words.search(f.metadata.get("help", ""))
    }
    # "Earlier GradProjLora files": a format, not a path.
    assert spoken_of - of_paths <= {"ExportConfig.format", "ExportConfig.output"}
    assert len(of_paths) > 30


def test_a_default_is_valid_whatever_the_bounds():
    assert Fruit(where="here").number == 0
    assert Shop().opens_at is None
    with pytest.raises(ConfigError, match="--opens_at must be at least 0 and less than 24, got 24"):
        Shop(opens_at=24)


# --- recorded settings ---


def test_recorded_flags_are_read_with_their_words_and_types():
    recorded = {"PLACE": "there", "budget": "auto", "share": 1e-3, "of another": 5}
    assert from_recorded(Fruit, recorded) == Fruit(where="there", budget=0, share=1e-3)
    with pytest.raises(ConfigError, match="number must be one int, got '3'"):
        from_recorded(Fruit, {**recorded, "number": "3"})


def test_settings_recorded_under_old_names_are_read_under_the_new_ones():
    assert current_names(Fruit, {"fraction": 0.1, "ripe": True}) == {"share": 0.1, "ripe": True}


# --- help ---


def test_help_groups_flags_by_section(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"], "gradproj test", Fruit, Shop, description="Sell fruit.")
    text = capsys.readouterr().out
    assert text.startswith("usage: gradproj test PLACE [--flag VALUE ...]\n\nSell fruit.\n")
    assert text.index("\nfruit:\n") < text.index("--colour red|green") < text.index("\nshop:\n")
    assert text.index("\nshop:\n") < text.index("--opens_at INT")
    assert "--kinds STR,..." in text
    assert "(default: 0.5)" in text


def test_help_shows_metavars_and_words_for_defaults(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"], "gradproj test", Fruit)
    text = capsys.readouterr().out
    assert "--basket NAME" in text
    assert "--stem none|MM " in text
    assert "(default: long)" in text
    assert "default: 30" not in text


def test_help_puts_a_derived_class_before_its_base_and_flags_in_their_own_groups(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"], "gradproj test", Market)
    text = capsys.readouterr().out
    in_order = [
        "\nmarket:\n", "--stalls", "\npeople:\n", "--owner NAME",
        "\nshop:\n", "--opens_at", "\nmoney:\n", "--till STR",
    ]  # fmt: skip
    places = [text.index(part) for part in in_order]
    assert places == sorted(places)


# --- the console script ---


def test_the_console_script_is_the_main_function():
    import importlib

    pyproject = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    module, _, name = pyproject["project"]["scripts"]["gradproj"].partition(":")
    assert getattr(importlib.import_module(module), name)(["--help"]) == 0
