"""Any line of a data file is the record that it says, or named and counted; nothing disappears."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.data.file_rows import ReadReport
from elastic.data.records import Record, read_records
from tests.helpers.damage import VALUES, damaged, examples, refusal

RECORD = {"task": "code", "context": "some context", "question": "next?", "answer": "yes", "source": "here/1"}
TURNS = {"turns": [["one", "two"], ["three", "four"]], "system": "be brief", "answer_prefix": "It is "}


def as_record(value):
    """What a line should give: a record, or None."""
    try:
        return Record.from_dict(value)
    except ValueError as error:
        refusal(error)
        return None


LINES = st.lists(damaged(RECORD) | damaged({**RECORD, **TURNS}) | st.just(RECORD) | VALUES, min_size=1, max_size=6)
RAW = st.sampled_from([b"{", b"\xff\xfe", b"9" * 5000, b"[" * 99_999, b"NaN", b'{"task": "code"} x', b'"\\ud800"'])


@pytest.mark.parametrize("ending", [".jsonl", ".json"])
def test_records_line_by_line(ending, tmp_path):
    file = tmp_path / f"records{ending}"

    @examples(100)
    @given(LINES, st.none() | RAW, st.integers(0, 6))
    def holds(values, raw, place):
        lines = [json.dumps(value).encode() for value in [RECORD, *values]]  # an object first: not one JSON array
        if raw is not None:
            lines.insert(1 + place, raw)
        file.write_bytes(b"\n".join(lines) + b"\n")
        expected = [found for value in [RECORD, *values] if (found := as_record(value)) is not None]
        report = ReadReport()
        assert list(read_records(file, report)) == expected
        assert report.good == len(expected) and report.good + len(report.bad) == len(lines)
        assert all(line.startswith(str(file)) and "\n" not in line for line in report.bad)

    holds()


def test_records_in_an_array(tmp_path):
    file = tmp_path / "records.json"

    @examples(100)
    @given(LINES, st.none() | RAW)
    def holds(values, raw):
        items = [json.dumps(value).encode() for value in values]
        file.write_bytes(b"[" + b",\n".join(items if raw is None else [*items, raw]) + b"]")
        expected = [found for value in values if (found := as_record(value)) is not None]
        report, found = ReadReport(), []
        try:
            for record in read_records(file, report):
                found.append(record)
            assert report.good + len(report.bad) == len(items) + (raw is not None)
        except ValueError as error:
            assert str(file) in str(error)
            assert raw is not None or not expected
            expected = expected[: len(found)]  # what was read before the damage
        assert found == expected

    holds()
