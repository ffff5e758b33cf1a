from __future__ import annotations

import math
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toolkit import schema
from toolkit.errors import UsageError
from toolkit.schema import (
    DimForm,
    Effect,
    HeldOut,
    Plan,
    Profile,
    Record,
    Response,
    TableRow,
    from_json,
    load_json,
    save_json,
    to_json,
)

RECORDS = sorted(
    (kind for kind in vars(schema).values() if isinstance(kind, type) and issubclass(kind, Record) and kind is not Record),
    key=lambda kind: kind.__name__,
)
FLAT = (TableRow, Effect, Response)
TEXT = st.text(st.characters(exclude_categories=["C"]), max_size=8)
LEAVES: dict[Any, st.SearchStrategy[Any]] = {
    str: TEXT,
    int: st.integers(-(2**53), 2**53),
    float: st.floats(allow_nan=False, allow_infinity=False),
    bool: st.booleans(),
    types.NoneType: st.none(),
}
EXAMPLES = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Any value of a type that a record's field may have."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind in LEAVES:
        return LEAVES[kind]
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is Annotated:
        return bounded(*arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        return st.lists(values(arguments[0]), max_size=2).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values, arguments))
    if origin is dict:
        return st.dictionaries(values(arguments[0]), values(arguments[1]), max_size=2)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*map(values, arguments))
    return records(kind)


def bounded(kind: type, limits: msgspec.Meta) -> st.SearchStrategy[Any]:
    """Numbers inside a field's limits."""
    low = limits.ge if limits.ge is not None else limits.gt
    high = limits.le if limits.le is not None else limits.lt
    if kind is int:
        return st.integers(-(2**53) if low is None else int(low), 2**53 if high is None else int(high))
    open_ends = {"exclude_min": limits.gt is not None, "exclude_max": limits.lt is not None}
    return st.floats(low, high, allow_nan=False, allow_infinity=False, **open_ends)


def records(kind: type[Record]) -> st.SearchStrategy[Any]:
    """Any record of a kind, as this version writes it."""
    fields = {name: values(hint) for name, hint in typing.get_type_hints(kind, include_extras=True).items()}
    if "schema" in fields:
        fields["schema"] = st.just(schema.SCHEMA)
    return st.fixed_dictionaries(fields).map(lambda chosen: kind(**chosen))


every_kind = pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)


def example(kind: type[Record]) -> Any:
    """One record with something in every field."""
    filled = {str: "text", int: 3, float: 0.1, bool: True}

    def value(hint: Any) -> Any:
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if hint in filled:
            return filled[hint]
        if origin is Literal:
            return arguments[0]
        if origin is tuple:
            return tuple(value(argument) for argument in arguments if argument is not Ellipsis)
        if origin is dict:
            return {value(arguments[0]): value(arguments[1])}
        if origin in (typing.Union, types.UnionType):
            return value(arguments[0])
        return example(hint)

    return kind(**{name: 1 if name == "schema" else value(hint) for name, hint in typing.get_type_hints(kind).items()})


@pytest.mark.slow
@every_kind
def test_json_gives_every_record_back(kind: type[Record]) -> None:
    @EXAMPLES
    @given(records(kind))
    def check(record: Record) -> None:
        assert from_json(kind, to_json(record)) == record

    check()


@pytest.mark.parametrize("kind", FLAT, ids=lambda kind: kind.__name__)
def test_csv_gives_every_row_back(kind: type[Record]) -> None:
    @EXAMPLES
    @given(st.lists(records(kind), max_size=3))
    def check(rows: list[Record]) -> None:
        assert schema.rows_from_csv(kind, schema.rows_to_csv(kind, rows)) == rows

    check()


@every_kind
def test_a_truncated_file_is_refused_wherever_it_was_cut(kind: type[Record]) -> None:
    text = to_json(example(kind)).rstrip()
    for length in range(len(text)):
        with pytest.raises(UsageError, match=kind.__name__):
            from_json(kind, text[:length])


@every_kind
def test_a_record_cannot_be_changed(kind: type[Record]) -> None:
    record = example(kind)
    for name in kind.__struct_fields__:
        with pytest.raises(AttributeError):
            setattr(record, name, getattr(record, name))


@every_kind
def test_an_unknown_a_missing_and_a_mistyped_field_are_refused(kind: type[Record]) -> None:
    plain = msgspec.json.decode(to_json(example(kind)))
    required = [field.name for field in msgspec.structs.fields(kind) if field.required]
    changed = [plain | {"surprise": 1}, *({k: v for k, v in plain.items() if k != name} for name in required)]
    changed += [
        plain | {name: {"not": ["this"]}}
        for name, hint in typing.get_type_hints(kind, include_extras=True).items()
        if typing.get_origin(hint) is not dict
    ]
    for fields in changed:
        with pytest.raises(UsageError) as caught:
            from_json(kind, msgspec.json.encode(fields), "some/file.json")
        assert "some/file.json" in caught.value.message and caught.value.hint


@pytest.mark.parametrize("kind", [kind for kind in RECORDS if "schema" in kind.__struct_fields__], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("version", [0, 2])
def test_another_schema_version_is_refused(kind: type[Record], version: int) -> None:
    plain = msgspec.json.decode(to_json(example(kind)))
    with pytest.raises(UsageError, match=f"schema {version}"):
        from_json(kind, msgspec.json.encode(plain | {"schema": version}))


def test_an_unknown_field_deep_inside_is_refused() -> None:
    plain = msgspec.json.decode(to_json(example(schema.Manifest)))
    plain["artefacts"][0]["inputs"][0]["surprise"] = 1
    with pytest.raises(UsageError, match="surprise"):
        from_json(schema.Manifest, msgspec.json.encode(plain))


@pytest.mark.parametrize("data", [b"", b"\xff\xfe", b'"\xff"', b"null", b"[]", b'{"id": "\xff"}', b"{}\n{}"])
def test_bytes_that_are_no_record_are_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "profile.json").write_bytes(data)
    with pytest.raises(UsageError, match=r"profile\.json"):
        load_json(Profile, tmp_path / "profile.json")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        load_json(Plan, tmp_path / "plan.json")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "1"])
def test_a_value_that_would_not_come_back_is_not_written(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "held_out.json"
    with pytest.raises(ValueError, match="HeldOut"):
        save_json(path, HeldOut(networks=1, mape=value, bias=0.0, spearman=0.0))
    assert not path.exists()


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "row.json"
    save_json(path, example(TableRow))
    save_json(path, msgspec.structs.replace(example(TableRow), key="conv"))
    assert load_json(TableRow, path).key == "conv"
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_failure_while_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    schema.write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        schema.write_text(path, "new" * 10_000 + "\ud800")  # half a surrogate pair has no UTF-8
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_table_that_does_not_fit_is_refused_with_its_line() -> None:
    text = schema.rows_to_csv(TableRow, [example(TableRow), example(TableRow)])
    header, first, second = text.splitlines()
    assert schema.rows_from_csv(TableRow, text) == [example(TableRow)] * 2
    for bad in ("", first, f"{header},more\n{first},1", header.replace("c_in", "c_inn")):
        with pytest.raises(UsageError, match="columns of TableRow"):
            schema.rows_from_csv(TableRow, bad)
    for bad in (second.rsplit(",", 1)[0], f"{second},1", second.replace("3", "three"), second.replace("0.1", "")):
        with pytest.raises(UsageError, match="table.csv, line 3"):
            schema.rows_from_csv(TableRow, f"{header}\n{first}\n{bad}\n", "table.csv")


NAMES = "abc"
FORMS = st.builds(
    lambda const, terms: DimForm(const=const, terms=tuple(sorted((tuple(sorted(names)), k) for names, k in terms))),
    st.integers(-5, 5),
    st.lists(st.tuples(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3), st.integers(-2, 5)), max_size=5),
)
SOME_WIDTHS = st.fixed_dictionaries({name: st.integers(0, 7) for name in NAMES})


@given(FORMS, SOME_WIDTHS, st.sets(st.sampled_from(NAMES)))
@settings(max_examples=60, deadline=None)
def test_a_form_with_some_widths_fixed_is_the_same_at_them(form: DimForm, widths: dict[str, int], names: set[str]) -> None:
    fixed = form.fixed({name: widths[name] for name in names})
    rest = {name: width for name, width in widths.items() if name not in names}
    assert fixed.at(rest) == form.at(widths) and not names.intersection(fixed.groups)
    assert fixed.fixed({}) == fixed and len(dict(fixed.terms)) == len(fixed.terms) and all(k for _, k in fixed.terms)


def test_terms_that_become_equal_are_one() -> None:
    form = DimForm(const=1, terms=((("h",), 64), (("h", "r"), 2)))
    assert form.groups == ("h", "r") and form.at({"h": 3, "r": 5}) == 1 + 192 + 30
    assert form.fixed({"r": 64}) == DimForm(const=1, terms=((("h",), 192),))
    assert form.fixed({"h": 2}) == DimForm(const=129, terms=((("r",), 4),))
