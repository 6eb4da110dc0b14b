"""Laws of what strangers wrote, on a screen: no control character of a store's names, texts or messages gets there."""

import pytest

from gradproj.errors import ConfigError, exit_code
from gradproj.formatting import clean, clean_lines, one_line

HOSTILE = "\x1b]0;owned\x07\x1b[2J\u202ename\x9b31m"
SEEN = "�]0;owned��[2J�name�31m"


def test_a_beginning_is_shown_whatever_stands_before_it():
    assert one_line(" " * 800 + "hello", 200) == "hello"
    assert one_line("\n" * 10**6 + "x" * 300, 20) == "x" * 19 + "…"


@pytest.mark.parametrize("text", ["می\u200cخواهم", "\U0001f468\u200d\U0001f469"])
def test_joiners_of_letters_and_emoji_stay(text):
    assert one_line(text, 200) == clean(text) == clean_lines(text) == text


def test_a_soft_hyphen_is_no_loss():
    assert one_line("soft\u00adware", 200) == "software"


def test_lines_stay_lines_and_everything_else_that_cannot_be_seen_is_replaced():
    assert clean_lines(f"a:\n  {HOSTILE}\r\n\tb\u2028c\ud800") == f"a:\n  {SEEN}�\n        b�c�"


def test_a_message_holds_no_control_character(capsys):
    def command():
        raise ConfigError(f"it has:\n  {HOSTILE}")

    assert exit_code(command) == 2
    assert capsys.readouterr().err == f"gradproj: it has:\n  {SEEN}\n"
