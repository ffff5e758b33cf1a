"""Settings of single methods: what is written comes back in the command that repeats the run, and nonsense is named."""

from __future__ import annotations

import pytest

from toolkit.budget import parse_budget
from toolkit.errors import UsageError
from toolkit.schema import RunRequest
from toolkit.settings import apply_settings, differing, examples

PLAIN = RunRequest(model="m", data="d", out="o", budget=parse_budget("0.5x"))


def test_a_setting_changes_its_field_and_no_other() -> None:
    found = apply_settings(PLAIN, ["psap.epochs=3", "train.lr=0.3", "psap.epochs=4"])
    assert (found.psap.epochs, found.train.lr) == (4, 0.3)
    assert set(differing(found)) == {"psap.epochs=4", "train.lr=0.3"} and differing(PLAIN) == []


def test_what_differs_makes_the_same_request_again() -> None:
    found = apply_settings(PLAIN, ["crespr.modules=4", "train.data=a=b.npz"])
    assert found.train.data == "a=b.npz"
    assert apply_settings(PLAIN, differing(found)) == found


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("epochs=3", "is not SECTION.NAME=VALUE"),
        ("psap.epochs", "is not SECTION.NAME=VALUE"),
        ("psap.epoch=3", "nothing that can be set"),
        ("no.epochs=3", "nothing that can be set"),
        ("psap.epochs=0", "Expected `int` >= 1"),
        ("psap.epochs=few", "Expected `int`"),
    ],
)
def test_nonsense_is_named(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        apply_settings(PLAIN, [text])


def test_every_setting_can_be_written_as_it_is_listed() -> None:
    assert apply_settings(PLAIN, examples(PLAIN)) == PLAIN
