import datetime
import json
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openpyxl import Workbook, load_workbook

from elm_ecg.training.data import tables
from elm_ecg.training.data.tables import demand, identifier, iter_table, read_table, renamed, table_file, table_rows
from helpers import write_rows


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
        table = write_rows(tmp_path / "t.csv", {"Record": "001", "Question ": "Is it?", "AGE": 5, "Site": "x"})
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
        assert read_table(tmp_path / "t.jsonl") == read_table(write_rows(tmp_path / "t.json", *rows)) == rows

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
            ("t.json", b"[]", "it has no rows"),
            ("t.json", b'[{"a": 1} {"a": 2}]', "after row 1 there is no comma"),
            ("t.json", b'[{"a": 1}, {"a": 2}', "after row 2 there is no comma, or its list does not end"),
            ("t.json", b'[{"a": 1}, {"a" 2}]', "row 2 is no JSON: Expecting ':' delimiter"),
            ("t.json", b'[{"a": 1}, {"a": "2}]', "row 2 is no JSON: Unterminated string"),
            ("t.json", b'[{"a": 1},]', "row 2 is no JSON"),
            ("t.json", b'[{"a": 1}] [', "something follows the end of its list"),
            ("t.json", b'[{"a": "\xff"}]', "it is no UTF-8 text"),
            ("t.json", b'[{"a": ' + b"[" * 100_000, "recursion"),
            ("t.parquet", b"PAR1", "no Parquet file, or damaged"),
            ("t.csv", b"sep=;\n", "it is empty"),
            ("t.jsonl", b'{"a": 1}\n{"a"\n', "Cannot read"),
        ],
    )
    def test_at_fault(self, name, content, message, tmp_path):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_table(tmp_path / name)

    def test_missing_column(self, tmp_path):
        with pytest.raises(ValueError, match="has no column c; it has a, b"):
            read_table(write_rows(tmp_path / "t.csv", {"a": 1, "b": 2}), ["a", "c"])

    @pytest.mark.parametrize("suffix", [".parquet", ".xlsx", ".json"])
    def test_damaged(self, suffix, tmp_path):
        """One error, whatever byte is another; or rows, where nothing depends on it."""
        file = write_rows(tmp_path / f"t{suffix}", *({"record": "a", "number": n} for n in range(20)))
        content = file.read_bytes()
        for position in range(0, len(content), max(1, len(content) // 60)):
            file.write_bytes(content[:position] + bytes([content[position] ^ 0x55]) + content[position + 1 :])
            with suppress(ValueError):
                assert read_table(file)

    def test_missing_file(self, tmp_path):
        for name in ("t.csv", "t.json", "t.parquet", "t.xlsx", "t.xlsx#Sheet"):
            with pytest.raises(FileNotFoundError):
                read_table(tmp_path / name)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


class TestJSON:
    @given(
        rows=st.lists(st.dictionaries(st.text(max_size=3), values, max_size=3), min_size=1, max_size=5),
        chunk=st.integers(1, 40),
        indent=st.sampled_from([None, 1]),
        is_ascii=st.booleans(),
    )
    def test_read_in_parts(self, rows, chunk, indent, is_ascii, tmp_path_factory):
        """Wherever the parts end."""
        file = tmp_path_factory.getbasetemp() / "parts.json"
        file.write_text(
            json.dumps(rows, indent=indent, ensure_ascii=is_ascii), encoding="utf-8", errors="surrogatepass"
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tables, "CHUNK", chunk)
            assert read_table(file) == rows

    def test_a_large_file_is_not_held(self, tmp_path, monkeypatch):
        monkeypatch.setattr(tables, "CHUNK", 1000)
        rows = [{"a": "x" * 500, "number": number} for number in range(100)]
        rows[50]["a"] = "y" * 5000  # longer than a part
        with (tmp_path / "t.json").open("w") as file:
            json.dump(rows, file)
        held = []
        take = tables._JSONText.take

        def watched(text):
            held.append(sys.getsizeof(text.held))
            return take(text)

        monkeypatch.setattr(tables._JSONText, "take", watched)
        assert list(iter_table(tmp_path / "t.json")) == rows
        assert max(held) < 20_000

    def test_what_python_writes(self, tmp_path):
        (tmp_path / "t.json").write_bytes(b'\xef\xbb\xbf [{"a": NaN, "b": 123456789012345678901234567890}]\r\n')
        (row,) = read_table(tmp_path / "t.json")
        assert row["a"] != row["a"]
        assert row["b"] == 123456789012345678901234567890
        (tmp_path / "t.json").write_bytes('[{"a": "ä"}]'.encode("utf-16"))
        assert read_table(tmp_path / "t.json") == [{"a": "ä"}]


class TestExcel:
    def test_same_as_its_csv(self, tmp_path):
        rows = [
            {"Record": "001", "age": 56.5, "sex": 1, "code": "007", "answer": 1.0, "note": "two\nlines"},
            {"Record": "002", "age": None, "sex": 0, "code": 12, "answer": True, "note": None},
        ]
        read = read_table(write_rows(tmp_path / "t.xlsx", *rows))
        assert read == [
            {"record": "001", "age": 56.5, "sex": 1, "code": "007", "answer": "1", "note": "two\nlines"},
            {"record": "002", "age": None, "sex": 0, "code": "12", "answer": "TRUE", "note": None},
        ]
        rows[1]["answer"] = "TRUE"  # as Excel writes it
        assert read == read_table(
            write_rows(tmp_path / "t.csv", *[{**row, "answer": _whole(row["answer"])} for row in rows])
        )

    def test_dates(self, tmp_path):
        """A name such as 2024-03-01 becomes a date in Excel, and its text here."""
        moment = datetime.datetime(2024, 3, 1, 12, 30)
        row = {"record": datetime.datetime(2024, 3, 1), "seen": moment, "at": moment.time(), "day": 45352}
        assert read_table(write_rows(tmp_path / "t.xlsx", row)) == [
            {"record": "2024-03-01", "seen": "2024-03-01T12:30:00", "at": "12:30:00", "day": 45352}
        ]

    def test_sheets(self, tmp_path):
        workbook = Workbook()
        workbook.active.append(["a"])
        workbook.active.append([1])
        second = workbook.create_sheet("Blatt 2")
        for cells in (["b", None], [2, None], [None, None]):
            second.append(cells)
        workbook.save(tmp_path / "t.xlsx")
        assert read_table(tmp_path / "t.xlsx") == read_table(Path(f"{tmp_path}/t.xlsx#Sheet")) == [{"a": 1}]
        assert read_table(Path(f"{tmp_path}/t.xlsx#Blatt 2")) == [{"b": 2}]
        with pytest.raises(
            ValueError,
            match=r"t.xlsx#Blatt: it has no sheet Blatt, but Sheet, Blatt 2. Did you mean Blatt 2\? Expected",
        ):
            read_table(Path(f"{tmp_path}/t.xlsx#Blatt"))
        load_workbook(tmp_path / "t.xlsx").save(tmp_path / "t.xlsx#x.xlsx")  # a name of its own
        assert table_file(tmp_path / "t.xlsx#x.xlsx") == (tmp_path / "t.xlsx#x.xlsx", None)

    def test_without_openpyxl(self, tmp_path, monkeypatch):
        table = write_rows(tmp_path / "t.xlsx", {"a": 1})
        monkeypatch.setitem(sys.modules, "openpyxl", None)
        with pytest.raises(ValueError, match=r"pip install 'elm-ecg\[tables\]', or save the sheet as CSV"):
            read_table(table)


def _whole(value):
    return 1 if value == 1.0 else value


class TestParquet:
    def test_rows(self, tmp_path):
        rows = [
            {
                "id": 1,
                "chat": [{"from": "human", "value": "Is it?"}],
                "image": {"bytes": b"\xff", "path": "a"},
                "at": None,
            },
            {"id": 2, "chat": [], "image": {"bytes": b"", "path": None}, "at": datetime.date(2024, 3, 1)},
        ]
        file = write_rows(tmp_path / "t.parquet", *rows)
        assert read_table(file) == [  # without the bytes
            {"id": 1, "chat": rows[0]["chat"], "image": {"path": "a"}, "at": None},
            {"id": 2, "chat": [], "image": {"path": None}, "at": "2024-03-01"},
        ]

    def test_names(self, tmp_path):
        file = write_rows(tmp_path / "t.parquet", {"a": 1, "b": {"c": 2}})
        assert read_table(file, names={"x": "a", "y": "b.c"}) == [{"b": {"c": 2}, "x": 1, "y": 2}]


class TestNames:
    def test_of_theirs(self):
        row = {"prompt": "Is it?", "question": "of another kind", "objects": {"ecg": ["a"]}}
        assert renamed(row, {"question": "prompt", "record": "objects.ecg", "age": "years"}) == {
            "objects": {"ecg": ["a"]},
            "question": "Is it?",
            "record": ["a"],
        }

    def test_tables_about_records(self, tmp_path):
        """They need not have all of the names, as those of the questions are among them."""
        names = {"question": "prompt", "patient_id": "subject", "record": "file"}
        rows = [{"file": "007", "subject": 12, "age": 5}]
        expected = ([{"age": 5, "patient_id": "12", "record": "007"}], {"patient_id", "record"})
        assert table_rows(write_rows(tmp_path / "t.csv", *rows), names) == expected
        assert table_rows(rows, names) == ([{"age": 5, "patient_id": 12, "record": "007"}], {"patient_id", "record"})

    def test_missing(self, tmp_path):
        file = write_rows(tmp_path / "t.csv", {"Prompt": "Is it?", "response": "yes"})
        for name, hint in (("PROMPT", "Prompt"), ("responce", "response")):
            with pytest.raises(
                ValueError, match=rf"has no column {name}; it has Prompt, response. Did you mean {hint}\?"
            ):
                read_table(file, names={"question": name})
        assert read_table(file, names={"question": "PROMPT"}, elsewhere=["question"])[0]["Prompt"] == "Is it?"
        with pytest.raises(ValueError, match=r"has no column xyz; it has Prompt, response\.$"):
            demand(["xyz"], read_table(file)[0], "It")
