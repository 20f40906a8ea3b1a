import csv
import json
from pathlib import Path
from typing import Any

import pytest

from elm_ecg.training.data.tables import identifier, read_table


def write(path: Path, *rows: dict[str, Any]) -> Path:
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text(json.dumps(rows))
    return path


def test_identifier():
    assert [identifier(name) for name in (17, 17.0, "17.0", " 17 ", "017", "a.0", "1.00")] == [
        *("17", "17", "17", "17"),
        *("017", "a.0", "1.00"),
    ]


class TestTable:
    def test_numbers_of_csv(self, tmp_path):
        (tmp_path / "t.csv").write_text(
            '\ufeffrecord,age,sex,code,answer,note\n001,56.5,1,007,1,"two\nlines"\n\n002,,0,12,2,\n', encoding="utf-8"
        )
        assert read_table(tmp_path / "t.csv") == [
            {"record": "001", "age": 56.5, "sex": 1, "code": "007", "answer": "1", "note": "two\nlines"},
            {"record": "002", "age": None, "sex": 0, "code": "12", "answer": "2", "note": None},
        ]

    def test_known_columns_in_capitals(self, tmp_path):
        table = write(tmp_path / "t.csv", {"Record": "001", "Question ": "Is it?", "AGE": 5, "Site": "x"})
        assert read_table(table) == [{"record": "001", "question": "Is it?", "age": 5, "Site": "x"}]

    @pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.txt"])
    @pytest.mark.parametrize("separator", [",", ";", "\t"])
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
    def test_separators_and_encodings(self, name, separator, encoding, tmp_path):
        """And with decimal commas, where the comma does not separate; what a spreadsheet leaves empty is no row and no column."""
        point = "." if separator == "," else ","
        lines = [["Record", "Alter", "question", "", ""], ["001", f"56{point}5", '"Is it, or; is it\t?"', "", ""]]
        lines += [["002", "", '"Größe?"', "", ""], [""] * 5]
        (tmp_path / name).write_text("\r\n".join(separator.join(line) for line in lines) + "\r\n", encoding=encoding)
        assert read_table(tmp_path / name) == [
            {"record": "001", "Alter": 56.5, "question": "Is it, or; is it\t?"},
            {"record": "002", "Alter": None, "question": "Größe?"},
        ]

    def test_separator_that_the_first_line_tells(self, tmp_path):
        (tmp_path / "t.csv").write_text("sep=;\nrecord;a, b, c, d\n001;1,5\n")
        assert read_table(tmp_path / "t.csv") == [{"record": "001", "a, b, c, d": 1.5}]

    def test_a_decimal_comma_is_no_number_where_commas_separate(self, tmp_path):
        (tmp_path / "t.csv").write_text('record,a\n001,"1,5"\n')
        assert read_table(tmp_path / "t.csv") == [{"record": "001", "a": "1,5"}]

    def test_json(self, tmp_path):
        rows = [{"a": 1, "b": "line\u2028end"}, {"a": None, "b": "x"}]
        (tmp_path / "t.jsonl").write_text(
            "\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8"
        )
        assert read_table(tmp_path / "t.jsonl") == read_table(write(tmp_path / "t.json", *rows)) == rows

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("t.csv", b"a,b\n1,2\n3\n", r"row 2 has another number of cells \(1\) than the header \(2\)"),
            ("t.csv", b'a,b\n1,"2\n', "unexpected end of data"),
            ("t.csv", b"a,b\n", "has no rows"),
            ("t.csv", b"", "it is empty"),
            ("t.csv", b"a,b,a,b\n1,2,3,4\n", "its header says 'a', 'b' more than once"),
            ("t.csv", "a,b\n1,ä\n".encode("latin-1"), r"no UTF-8 text .*; save it as that \(in Excel: 'CSV UTF-8'\)"),
            ("t.xlsx", b"anything", "no Excel file, or damaged"),
            (
                "t.ods",
                b"anything",
                r"does not end in .xlsx; save it as that, or its sheet as CSV \(in Excel: 'CSV UTF-8'\)",
            ),
            ("t.csv", b"PK\x03\x04\x14\x00", "a spreadsheet, but its name does not end in .xlsx"),
            ("t.csv", b"Record,record\na,b\n", "its header says 'record' more than once"),
            ("t.csv", b"\xff\xfe\x00", "Cannot read"),
            ("t.json", b"[1, 2]", "rows other than objects"),
            ("t.jsonl", b'{"a": 1}\n{"a"\n', "Cannot read"),
        ],
    )
    def test_at_fault(self, name, content, message, tmp_path):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_table(tmp_path / name)

    def test_missing_column(self, tmp_path):
        with pytest.raises(ValueError, match="has no column c; it has a, b"):
            read_table(write(tmp_path / "t.csv", {"a": 1, "b": 2}), ["a", "c"])
