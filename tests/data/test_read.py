"""Reading: every format gives the same records, and bad files say where and what."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from forge_core.data import DataError, read_records

ROWS = [{"question": "Größe?\nsecond line", "answer": 'a, "b"'}, {"question": "Q2", "answer": "A2"}]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".feather":
        pyarrow.feather.write_feather(table, path)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
    return path


def fails(path: Path, message: str, columns: dict[str, str] | None = None) -> None:
    with pytest.raises(DataError, match=message) as caught:
        list(read_records(path, columns))
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("a.jsonl", [1, 2]),
        ("a.json", [2, 6]),
        ("a.csv", [2, 4]),
        ("a.parquet", [1, 2]),
        ("a.arrow", [1, 2]),
        ("a.feather", [1, 2]),
    ],
)
def test_formats_give_the_same_records(tmp_path: Path, name: str, lines: list[int]) -> None:
    path = write(tmp_path / name, ROWS)
    records = list(read_records(path))
    assert [record.data for record in records] == ROWS
    assert [record.line for record in records] == lines
    assert {record.file for record in records} == {str(path)}


def test_folder_in_name_order_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", ".c.jsonl", "_d.jsonl"):
        write(tmp_path / name, [{"text": name}])
    assert [record.data["text"] for record in read_records(tmp_path)] == ["a.jsonl", "b.jsonl"]


def test_columns_are_renamed_and_the_others_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "p", "response": "r", "id": "7"}])
    (record,) = read_records(path, {"question": "prompt", "answer": "response"})
    assert record.data == {"id": "7", "question": "p", "answer": "r"}


def test_a_wrong_column_names_those_present(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "p", "response": "r"}])
    fails(path, r":1: no column 'promt'; the row has 'prompt', 'response'; correct `columns`", {"question": "promt"})


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl: no such file or folder .*; expected a data file"):
        list(read_records(tmp_path / "nowhere.jsonl"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_file(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    fails(path, "the file is empty, expected at least one row")


@pytest.mark.parametrize(("name", "content"), [("a.json", "[ ]"), ("a.csv", "question,answer\n")])
def test_no_rows(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    fails(tmp_path / name, "the file is empty")


def test_folder_errors(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    fails(folder, "the folder holds no data files")
    write(folder / "a.jsonl", ROWS)
    write(folder / "b.csv", ROWS)
    fails(folder, r"the folder mixes \.csv, \.jsonl files; keep one format")
    (folder / "b.csv").rename(folder / "b.txt")
    with pytest.raises(DataError, match=r"b\.txt: unknown extension '\.txt', expected one of \.jsonl"):
        list(read_records(folder))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', r":2: not valid JSON \(Expecting value at column 7\): '{\"a\":'"),
        ("a.jsonl", '{"a": 1}\n[1]\n', r":2: got a JSON list, expected an object"),
        ("a.jsonl", '\n\n"text"\n', r":3: got a JSON string"),
        ("a.csv", "q,,b\n1,2,3\n", r":1: header .* has an empty"),
        ("a.json", '{"a": 1}\n{"a": 2}', r":1: got .*expected a list of objects.*rename it to \.jsonl"),
        ("a.json", '[{"a": 1},\n {"a": }]', r":2: not valid JSON"),
        ("a.json", '[{"a": 1},\n\n 3]', r":3: got a JSON number"),
        ("a.json", '[{"a": 1}\n {"a": 2}]', r":2: got '\{.*expected ',' or '\]'"),
        ("a.json", '[{"a": 1},\n {"a": 2}\n', r":3: the file ends inside the list"),
        ("a.json", "[{}]\n[]", r":1: text after the end of the list"),
        ("a.csv", "q,a\n1,2\n1,2,3\n", r":3: got 3 fields, expected 2 as in the header"),
        ("a.csv", 'q,a\n"1"x,2\n', r":2: not valid CSV"),
        ("a.csv", "q,q\n1,2\n", r":1: header .* repeated column name"),
        ("a.parquet", "PAR", r": not a readable Parquet file"),
        ("a.arrow", "nothing", r": not a readable Arrow file"),
    ],
)
def test_malformed_content(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    fails(tmp_path / name, message)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_other_encodings_are_refused_with_their_line(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, [{"a": "x"}, {"a": "y"}])
    path.write_bytes(path.read_bytes().replace(b"y", "é".encode("latin-1")))
    fails(path, r":\d+: byte 0xe9 is not UTF-8; convert the file")


def test_long_csv_fields(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [{"text": "x" * 200_000}])
    assert len(next(read_records(path)).data["text"]) == 200_000
