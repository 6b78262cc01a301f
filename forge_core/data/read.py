"""Step 1, read: JSON Lines, JSON, CSV, Parquet and Arrow files become records that know their file and line."""

import csv
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

_FORMATS = {
    ".jsonl": "JSON Lines",
    ".json": "JSON",
    ".csv": "CSV",
    ".parquet": "Parquet",
    ".pq": "Parquet",
    ".arrow": "Arrow",
    ".feather": "Arrow",
    ".ipc": "Arrow",
}
_CSV_FIELD_LIMIT = 2**31 - 1  # characters; the csv module's own default of 131,072 is shorter than a book chapter


class DataError(ValueError):
    """Bad data. The message names the file and line, what came, what was expected and what to do."""


@dataclass(frozen=True, slots=True)
class Record:
    """One row of input.

    Attributes:
        data: column name -> value.
        file: path of the file.
        line: 1-based line at which the row starts; for Parquet and Arrow the 1-based row number.
    """

    data: dict[str, Any]
    file: str
    line: int


def list_files(path: str | os.PathLike[str]) -> list[Path]:
    """Data files behind `path`: itself, or the files of a folder by name (not those starting with '.' or '_').

    Raises:
        FileNotFoundError: nothing is there.
        DataError: unknown extension, a folder without data files or with several kinds of them.
    """
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(
            f"{root}: no such file or folder (looked at {root.absolute()}); expected a data file or a folder of them"
        )
    if root.is_dir():
        files = sorted(entry for entry in root.iterdir() if entry.is_file() and entry.name[0] not in "._")
    else:
        files = [root]
    if not files:
        raise DataError(f"{root}: the folder holds no data files; expected files ending in {', '.join(_FORMATS)}")
    for file in files:
        if file.suffix.lower() not in _FORMATS:
            raise DataError(
                f"{file}: unknown extension {file.suffix!r}, expected one of {', '.join(_FORMATS)}; "
                "rename the file, or let its name start with '_' to have it skipped"
            )
    if len({_FORMATS[file.suffix.lower()] for file in files}) > 1:
        raise DataError(
            f"{root}: the folder mixes {', '.join(sorted({file.suffix for file in files}))} files; "
            "keep one format per folder"
        )
    return files


def read_records(path: str | os.PathLike[str], columns: Mapping[str, str] | None = None) -> Iterator[Record]:
    """Reads the records of a file or folder one after the other.

    Args:
        path: .jsonl, .json (a list of objects), .csv (with a header), .parquet, .pq, .arrow, .feather or .ipc file,
            or a folder of files of one of these formats.
        columns: canonical name -> name in the file, e.g. {"question": "prompt", "answer": "response"}.

    Raises:
        FileNotFoundError: nothing at `path`.
        DataError: an unreadable row (file:line), a column of `columns` that the row lacks, an empty file.
    """
    for file in list_files(path):
        empty = True
        for record in _READERS[_FORMATS[file.suffix.lower()]](file):
            empty = False
            yield _rename(record, columns) if columns else record
        if empty:
            raise DataError(f"{file}: the file is empty, expected at least one row; remove it or fill it")


def _rename(record: Record, columns: Mapping[str, str]) -> Record:
    missing = [name for name in columns.values() if name not in record.data]
    if missing:
        raise DataError(
            f"{record.file}:{record.line}: no column {', '.join(map(repr, missing))}; the row has "
            f"{', '.join(map(repr, record.data)) or 'no columns'}; correct `columns`"
        )
    taken = set(columns.values())
    data = {name: value for name, value in record.data.items() if name not in taken}
    data.update({name: record.data[source] for name, source in columns.items()})
    return Record(data, record.file, record.line)


def _object(value: object, file: Path, line: int) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"{file}:{line}: got a JSON {_json_type(value)}, expected an object {{...}} per row")
    return Record(value, str(file), line)


def _json_type(value: object) -> str:
    names = {str: "string", list: "list", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _decode(raw: bytes, file: Path, line: int) -> str:
    try:
        return raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line += raw[: error.start].count(b"\n")
        raise DataError(
            f"{file}:{line}: byte 0x{raw[error.start]:02x} is not UTF-8; convert the file to UTF-8"
        ) from error


def _read_jsonl(file: Path) -> Iterator[Record]:
    with open(file, "rb") as lines:
        for line, raw in enumerate(lines, start=1):
            text = _decode(raw, file, line).rstrip("\r\n")
            if not text.strip():
                continue
            try:
                value = json.loads(text)
            except json.JSONDecodeError as error:
                shown = text.strip()[:60]
                raise DataError(
                    f"{file}:{line}: not valid JSON ({error.msg} at column {error.colno}): {shown!r}; "
                    "expected one object per line"
                ) from error
            yield _object(value, file, line)


def _read_json(file: Path) -> Iterator[Record]:
    text = _decode(file.read_bytes(), file, 1)
    decoder = json.JSONDecoder()
    position = _skip_space(text, 0)
    line, counted = 1, 0
    if position == len(text):
        return
    if text[position] != "[":
        hint = "; it looks like JSON Lines: rename it to .jsonl" if text[position] == "{" else ""
        raise DataError(f"{file}:1: got {text[position : position + 20]!r}, expected a list of objects [...]{hint}")
    position = _skip_space(text, position + 1)
    first = True
    while position < len(text) and text[position] != "]":
        if not first:
            if text[position] != ",":
                line += text.count("\n", counted, position)
                raise DataError(f"{file}:{line}: got {text[position : position + 20]!r}, expected ',' or ']'")
            position = _skip_space(text, position + 1)
        first = False
        line += text.count("\n", counted, position)
        counted = position
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(f"{file}:{error.lineno}: not valid JSON ({error.msg} at column {error.colno})") from error
        yield _object(value, file, line)
        position = _skip_space(text, position)
    line += text.count("\n", counted, position)
    if position == len(text):
        raise DataError(f"{file}:{line}: the file ends inside the list, expected ']'; it may be cut off")
    if text[position + 1 :].strip():
        raise DataError(f"{file}:{line}: text after the end of the list; expected one list of objects")


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _read_csv(file: Path) -> Iterator[Record]:
    with open(file, "rb") as raw:
        for line, content in enumerate(raw, start=1):
            _decode(content, file, line)
    with open(file, encoding="utf-8-sig", newline="") as source:
        yield from _csv_rows(file, source)


def _csv_rows(file: Path, source: TextIO) -> Iterator[Record]:
    csv.field_size_limit(max(csv.field_size_limit(), _CSV_FIELD_LIMIT))
    reader = csv.reader(source, strict=True)
    header: list[str] | None = None
    line = 1
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"{file}:{line}: not valid CSV ({error}); quote fields that hold quotes or commas"
            ) from error
        if row is None:
            return
        if len(row) <= 1 and not "".join(row).strip():
            pass  # a blank line
        elif header is None:
            header = row
            if len(set(header)) < len(header) or not all(name.strip() for name in header):
                raise DataError(
                    f"{file}:1: header {header} has an empty or repeated column name; name each column once"
                )
        else:
            if len(row) != len(header):
                raise DataError(
                    f"{file}:{line}: got {len(row)} fields, expected {len(header)} as in the header {header}; "
                    "quote fields that hold commas or line breaks"
                )
            yield Record(dict(zip(header, row, strict=True)), str(file), line)
        line = reader.line_num + 1


def _read_parquet(file: Path) -> Iterator[Record]:
    try:
        source = pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise DataError(f"{file}: not a readable Parquet file ({error})") from error
    with source:
        yield from _batch_rows(file, source.iter_batches())


def _read_arrow(file: Path) -> Iterator[Record]:
    with pa.memory_map(str(file)) as source:
        try:
            if source.read(6) == b"ARROW1":  # the file format starts with its name, the stream format does not
                source.seek(0)
                batches = pa.ipc.open_file(source)
                yield from _batch_rows(file, (batches.get_batch(i) for i in range(batches.num_record_batches)))
            else:
                source.seek(0)
                yield from _batch_rows(file, iter(pa.ipc.open_stream(source)))
        except pa.ArrowInvalid as error:
            raise DataError(f"{file}: not a readable Arrow file ({error})") from error


def _batch_rows(file: Path, batches: Iterator[pa.RecordBatch]) -> Iterator[Record]:
    row = 0
    for batch in batches:
        for data in batch.to_pylist():
            row += 1
            yield Record(data, str(file), row)


_READERS = {
    "JSON Lines": _read_jsonl,
    "JSON": _read_json,
    "CSV": _read_csv,
    "Parquet": _read_parquet,
    "Arrow": _read_arrow,
}
