"""Untrusted text reaches a terminal without control characters."""

import io
import sys

import pytest

from gradproj.errors import ConfigError, exit_code
from gradproj.formatting import clean, clean_lines, one_line

HOSTILE = "\x1b]0;owned\x07\x1b[2J\u202ename\x9b31m"
SEEN = "�]0;owned��[2J�name�31m"


def test_one_line_shows_the_beginning_after_any_blanks():
    assert one_line(" " * 800 + "hello", 200) == "hello"
    assert one_line("\n" * 10**6 + "x" * 300, 20) == "x" * 19 + "…"


@pytest.mark.parametrize("text", ["می\u200cخواهم", "\U0001f468\u200d\U0001f469"])
def test_joiners_of_letters_and_emoji_are_kept(text):
    assert one_line(text, 200) == clean(text) == clean_lines(text) == text


def test_soft_hyphens_are_dropped():
    assert one_line("soft\u00adware", 200) == "software"


def test_clean_lines_keeps_lines_and_replaces_other_invisible_characters():
    assert clean_lines(f"a:\n  {HOSTILE}\r\n\tb\u2028c\ud800") == f"a:\n  {SEEN}�\n        b�c�"


def test_messages_hold_no_control_character(capsys):
    def command():
        raise ConfigError(f"it has:\n  {HOSTILE}")

    assert exit_code(command) == 2
    assert capsys.readouterr().err == f"gradproj: it has:\n  {SEEN}\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_commands_print_on_any_screen(encoding, monkeypatch):
    screens = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", screens[0])
    monkeypatch.setattr(sys, "stderr", screens[1])

    def command():
        print("tar … \N{GREEK SMALL LETTER ALPHA} \udc80", file=sys.stdout)
        raise ConfigError("no … \N{GREEK SMALL LETTER ALPHA} \udc80")

    assert exit_code(command) == 2
    shown = ("… α" if encoding == "utf-8" else r"\u2026 \u03b1").encode()
    replaced = "\ufffd" if encoding == "utf-8" else r"\ufffd"
    printed, errors = (screen.detach().getvalue() for screen in screens)
    assert printed == b"tar " + shown + b" \\udc80\n"
    assert errors == b"gradproj: no " + shown + f" {replaced}\n".encode()
