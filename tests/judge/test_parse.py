import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speciarl_jax.judge.parse import (
    _ASCII_TABLE,
    _NOT_KEPT,
    extract_answer,
    normalize,
    parse_batch,
    parse_batch_by_id,
    parse_category,
)
from speciarl_jax.types import Category


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Black-footed   Albatross!", "black-footed albatross"),
        ("Anna's Hummingbird", "anna s hummingbird"),
        ("cafe\u0301", "café"),  # NFC first
        ("a_b", "a b"),  # the underscore is punctuation
        ("F/A-18", "f a-18"),
        ("ÉCLAIR\u2014x\u2009½", "éclair\u2014x ½"),  # em dash and the number one half stay
        ("“”!?", ""),
        ("日本語、鳥", "日本語 鳥"),
        ("\x00\x1f\n", ""),
    ],
)
def test_normalize_by_hand(text, expected):
    assert normalize(text) == expected


def test_normalize_keeps_exactly_letters_numbers_dashes_for_every_character():
    wrong = []
    for char in map(chr, range(0x20000)):  # the planes above hold ideographs and nothing else
        category = unicodedata.category(char)
        kept = category[0] in "LN" or category == "Pd" or char.isspace()
        if (_NOT_KEPT.match(char) is None) != kept:
            wrong.append(hex(ord(char)))
    assert wrong == []
    assert {c: _ASCII_TABLE[c] for c in range(128)} == {
        c: " " if _NOT_KEPT.match(chr(c)) or chr(c).isspace() else chr(c).lower()
        for c in range(128)
    }


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_normalize_leaves_nothing_that_could_close_a_template(text):
    result = normalize(text)
    assert not set(result) & set("\"'{}[]<>\\\n\r\t`|:;,.\0")
    assert result == " ".join(result.split())


@given(st.text(st.characters(max_codepoint=0x24F, exclude_characters="\u0130")))
def test_normalize_is_idempotent_on_latin_text(text):
    assert normalize(normalize(text)) == normalize(text)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<think>red</think><answer> Scarlet finch \n</answer>", "Scarlet finch"),
        ("<answer>one</answer><answer>two</answer>", "one"),
        ("<answer>two\nlines</answer>", "two\nlines"),
        ("<answer></answer><answer>late</answer>", None),
        ("<answer> !? </answer>", None),
        ("<answer>open", None),
        ("finch", None),
        ("", None),
    ],
)
def test_extract_answer(completion, expected):
    assert extract_answer(completion) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("specific", Category.SPECIFIC),
        (" More Specific.\n", Category.MORE_SPECIFIC),
        ("less_specific", Category.LESS_SPECIFIC),
        ("less-specific", Category.LESS_SPECIFIC),
        ('"wrong"', Category.WRONG),
        ("**generic**", Category.GENERIC),
        ("`abstain`", Category.ABSTAIN),
        ('{"category": "less specific"}', Category.LESS_SPECIFIC),
        ("<think>specific or generic?</think>\n\ngeneric", Category.GENERIC),
        ("specific, not generic", None),
        ("specific generic", None),
        ("the answer is specific", None),
        ("unspecific", None),
        ("", None),
        ("{}", None),
        ('{"category": "specific", "note": "x"}', None),
        ('{"category": ["specific"]}', None),
        ('{"category": "specific"} {"category": "wrong"}', None),
        ("specific\nwrong", None),
        ("<think>specific", None),
        ("4", None),
    ],
)
def test_parse_category(reply, expected):
    assert parse_category(reply) is expected


def test_parse_category_binary():
    assert parse_category("Correct", is_binary=True) is Category.SPECIFIC
    assert parse_category("incorrect", is_binary=True) is Category.WRONG
    assert parse_category("specific", is_binary=True) is None
    assert parse_category("correct") is None


def test_parse_batch_is_all_or_nothing():
    both = [Category.WRONG, Category.MORE_SPECIFIC]
    assert parse_batch('["wrong", "more specific"]', 2) == both
    assert parse_batch('{"categories": ["wrong", "more_specific"]}', 2) == both
    assert parse_batch('["wrong"]', 2) is None
    assert parse_batch('["wrong", "wrong", "wrong"]', 2) is None
    assert parse_batch('["wrong", "no"]', 2) is None
    assert parse_batch('["wrong", 3]', 2) is None
    assert parse_batch("wrong, wrong", 2) is None
    assert parse_batch("[" * 100_000, 2) is None


def test_parse_batch_by_id_is_all_or_nothing():
    ids = ["1", "2"]
    both = [Category.WRONG, Category.MORE_SPECIFIC]
    assert parse_batch_by_id('{"1": "wrong", "2": "more specific"}', ids) == both
    assert parse_batch_by_id('{"2": "more specific", "1": "wrong"}', ids) == both  # reversed
    assert parse_batch_by_id('<think>x</think>{"1": "correct", "2": "incorrect"}', ids, True) == [
        Category.SPECIFIC,
        Category.WRONG,
    ]
    for text in (
        '{"1": "wrong"}',
        '{"2": "wrong", "3": "wrong"}',  # shifted
        '{"0": "wrong", "1": "wrong"}',
        '{"1": "wrong", "2": "wrong", "3": "wrong"}',
        '{"1": "wrong", "1": "generic", "2": "wrong"}',
        '{"1": "wrong", "2": "no"}',
        '{"1": "wrong", "2": ["wrong"]}',
        '["wrong", "wrong"]',
        '{"categories": ["wrong", "wrong"]}',
        '{"1": "wrong", "02": "wrong"}',
    ):
        assert parse_batch_by_id(text, ids) is None, text


@pytest.mark.parametrize(
    "text",
    [
        '{"category": "specific", "category": "specific"}',
        '{"categories": ["wrong", "wrong"], "categories": ["wrong", "wrong"]}',
    ],
)
def test_a_key_given_twice_is_no_label(text):
    assert parse_category(text) is None
    assert parse_batch(text, 2) is None


PIECES = st.lists(
    st.sampled_from([*(c.label for c in Category), '"', "{", "}", "[", "]", ":", "category", " "])
)


@given(st.text() | PIECES.map("".join), st.integers(0, 3))
def test_a_label_is_only_read_where_the_reply_is_one(reply, count):
    """Any text is read or refused, never an error; what is read was said, and nothing else."""
    category = parse_category(reply)
    letters = "".join(c for c in reply.lower() if c.isalpha()).removeprefix("category")
    if category is not None:
        assert letters == category.label.replace("_", "")
    labels = parse_batch(reply, count)
    if labels is not None:
        assert len(labels) == count
        assert "".join(label.label for label in labels).replace("_", "") in letters
