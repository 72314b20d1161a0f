"""Text of others is read within bounds; what is wrong with it is one error that names the place."""

import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_opd.errors import UserError
from megatron_opd.safety.untrusted import MOST_DIGITS, Console, load_json, load_toml, printable, read_bytes, read_json, read_object


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "not JSON: "),
        (b"\xe9", "byte 0xe9 at column 1"),
        (b"[\0]", "NUL"),
        (b"[" * 100_000, "levels deep"),
        (b"[" * 200 + b"]" * 200, "levels deep"),
        (b'{"a":' * 200 + b"1" + b"}" * 200, "levels deep"),
        (b'{"a": 1, "a": 2}', "'a' is there twice"),
        (b"9" * 10_000, "not JSON: "),
        (b'"\\ud83d"', "half a character"),
        (b'{"\\uDE00": 1}', "half a character"),
        (b"", "not JSON: "),
    ],
)
def test_what_is_no_json_is_one_error(text, message):
    with pytest.raises(UserError, match=message) as caught:
        load_json(text, "the file")
    assert str(caught.value).startswith("the file")
    assert "\n" not in str(caught.value)


def test_whole_json_is_read():
    assert load_json('{"a": [1, null, "\\ud83d\\ude00"]}', "") == {"a": [1, None, "\U0001f600"]}
    assert load_json(b"[" * 90 + b"]" * 90, "")
    assert load_json(b'{"a": 1, "a": 2}', "", unique=False) == {"a": 2}


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 100_000,
        "a = " + "[" * 200 + "]" * 200,
        "a = ",
        "a = " + "9" * 10_000,
        "a.b." * 50_000 + "c=1",
        "'a' . " * 101 + "c=1",
    ],
)
def test_what_is_no_toml_is_one_error(text):
    with pytest.raises(UserError, match=r"recipe\.toml: "):
        load_toml(text, "recipe.toml")


def test_dots_in_a_text_are_no_key():
    text = ". ".join("a" * 300)
    assert load_toml(f'# {text}\nx = "{text}"\n', "") == {"x": text}
    with pytest.raises(UserError, match="levels deep"):
        load_toml(f"x = {{{text} = 1}}", "")


def test_files(tmp_path):
    path = tmp_path / "file.json"
    path.write_bytes(b"[1]")
    assert read_json(path) == [1]
    with pytest.raises(UserError, match=r"file\.json: must be a JSON object, not list"):
        read_object(path)
    with pytest.raises(UserError, match=r"file\.json: more than 0 MiB"):
        read_bytes(path, 2)
    with pytest.raises(UserError, match="not a file"):
        read_json(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "missing.json")


def test_a_console_is_a_stream(capsys):
    console = Console(sys.stdout)
    print("a\x1b[31m\r", file=console)
    assert capsys.readouterr().out == "a\\x1b[31m\\r\n"
    assert (console.encoding, console.buffer) == (sys.stdout.encoding, sys.stdout.buffer)


def test_control_characters_are_shown_not_sent():
    assert printable("a\x1b[31mb\r\x9b\u202ec\n\té\U0001f600\u061c") == "a\\x1b[31mb\\r\\x9b\\u202ec\n\té\U0001f600\\u061c"


@given(st.lists(st.integers(1, MOST_DIGITS + 30), max_size=6), st.integers(0, 40))
def test_long_numbers_are_found_wherever_they_stand(lengths: list[int], shift: int) -> None:
    """Of a text only some characters are looked at first; a number of a text may have any length."""
    text = " " * shift + json.dumps([int("1" * length) for length in lengths])
    if max(lengths, default=0) > MOST_DIGITS:
        with pytest.raises(UserError, match=f"more than {MOST_DIGITS} digits"):
            load_json(text, "x")
    else:
        assert load_json(text, "x") == [int("1" * length) for length in lengths]
    assert load_json(json.dumps("1" * (MOST_DIGITS + shift)), "x") == "1" * (MOST_DIGITS + shift)
