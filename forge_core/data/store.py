"""Tokenized samples on disk: safetensors shards, memory-mapped, one folder per data set."""

import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from forge_core.atomic import atomic_directory

from .read import DataError

FORMAT_VERSION = 1
INDEX = "index.json"
SHARD_TOKENS = 2**26  # tokens per shard: 256 MiB of ids
_DTYPES: dict[str, np.dtype[Any]] = {
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "U8": np.dtype("u1"),
}


@dataclass(frozen=True, slots=True)
class Sample:
    """One tokenized sample on its way to disk; `file` is an index into the data set's files."""

    tokens: Sequence[int]
    loss_mask: Sequence[int]
    weight: float
    file: int
    line: int


class TokenStore:
    """The samples of one data set, memory-mapped; what is not read takes no memory.

    A shard is a safetensors file with tokens int32 [total], loss_mask uint8 [total], offsets int64 [n + 1],
    weight float32 [n], file int32 [n] and line int64 [n]. index.json lists the shards and what the tokens were made
    from; it is written with them in one step, so a store is complete or absent.

    Attributes:
        token_counts: int64 [n], tokens of each sample.
        loss_token_counts: int64 [n], tokens of each sample that are predicted with loss. The first token of a sample
            is never predicted.
        info: the index: hashes of input, tokenizer and template, options, counts of what was dropped or changed.
    """

    def __init__(self, path: str | os.PathLike[str], files: Sequence[str] | None = None) -> None:
        self.path = Path(path)
        self.info: dict[str, Any] = json.loads((self.path / INDEX).read_text(encoding="utf-8"))
        self.files: list[str] = list(files) if files is not None else self.info["files"]
        self._shards = [self._open(shard["file"], shard["bytes"]) for shard in self.info["shards"]]
        self._starts = np.cumsum([0, *(shard["weight"].size for shard in self._shards)]).tolist()
        self.token_counts: NDArray[np.int64] = np.concatenate([np.diff(shard["offsets"]) for shard in self._shards])
        self.loss_token_counts: NDArray[np.int64] = np.concatenate([shard["loss_tokens"] for shard in self._shards])

    @property
    def key(self) -> str:
        """Hex hash of everything the tokens depend on."""
        return str(self.info["key"])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def sample(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.uint8], float]:
        """(tokens int32 [length], loss_mask uint8 [length], weight) of a sample; the arrays are views of the file."""
        shard, row = self._locate(index)
        start, end = shard["offsets"][row : row + 2]
        return shard["tokens"][start:end], shard["loss_mask"][start:end], float(shard["weight"][row])

    def origin(self, index: int) -> tuple[str, int]:
        """(file, line) that a sample came from."""
        shard, row = self._locate(index)
        return self.files[int(shard["file"][row])], int(shard["line"][row])

    def _locate(self, index: int) -> tuple[dict[str, NDArray[Any]], int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a store of {len(self)} samples")
        number = bisect_right(self._starts, index) - 1
        return self._shards[number], index - self._starts[number]

    def _open(self, name: str, size: int) -> dict[str, NDArray[Any]]:
        file = self.path / name
        if not file.is_file() or file.stat().st_size != size:
            found = f"{file.stat().st_size} bytes" if file.is_file() else "missing"
            raise DataError(
                f"{file}: the shard is {found}, expected {size} bytes; the cache is damaged, "
                f"delete {self.path} to rebuild it"
            )
        return _memory_map(file)


def _memory_map(file: Path) -> dict[str, NDArray[Any]]:
    """The tensors of a safetensors file as read-only views of the mapped file (safetensors' own reader copies)."""
    with open(file, "rb") as source:
        header_size = int.from_bytes(source.read(8), "little")
        header = json.loads(source.read(header_size))
    data = np.memmap(file, dtype=np.uint8, mode="r", offset=8 + header_size)
    tensors: dict[str, NDArray[Any]] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            view = np.asarray(data[start:end]).view(_DTYPES[entry["dtype"]])
            tensors[name] = view.reshape(entry["shape"])
    return tensors


def write_store(
    path: Path, samples: Iterable[Sample], info: dict[str, Any], *, shard_tokens: int = SHARD_TOKENS
) -> None:
    """Writes the samples in order as a store; the folder appears when it is complete.

    `info` is read when all samples have been taken, so that its counts may grow while `samples` is consumed.

    Raises:
        DataError: there is no sample.
    """
    try:
        with atomic_directory(path) as folder:
            shards: list[dict[str, Any]] = []
            pending: list[Sample] = []
            tokens = 0
            for sample in samples:
                pending.append(sample)
                tokens += len(sample.tokens)
                if tokens >= shard_tokens:
                    shards.append(_write_shard(folder, len(shards), pending))
                    pending, tokens = [], 0
            if pending:
                shards.append(_write_shard(folder, len(shards), pending))
            if not shards:
                raise DataError(f"{path}: no sample to write")
            index = {**info, "shards": shards}
            (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
    except OSError:
        # Another process that tokenizes the same data may have put its store in place first: the same content.
        if not (path / INDEX).is_file():
            raise


def _write_shard(folder: Path, number: int, samples: list[Sample]) -> dict[str, Any]:
    lengths = np.array([len(sample.tokens) for sample in samples], np.int64)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    loss_mask = np.concatenate([np.asarray(sample.loss_mask, np.uint8) for sample in samples])
    trained = np.concatenate([np.zeros(1, np.int64), np.cumsum(loss_mask, dtype=np.int64)])
    tensors = {
        "tokens": np.concatenate([np.asarray(sample.tokens, np.int32) for sample in samples]),
        "loss_mask": loss_mask,
        "offsets": offsets,
        "loss_tokens": trained[offsets[1:]] - trained[offsets[:-1]] - loss_mask[offsets[:-1]],
        "weight": np.array([sample.weight for sample in samples], np.float32),
        "file": np.array([sample.file for sample in samples], np.int32),
        "line": np.array([sample.line for sample in samples], np.int64),
    }
    name = f"tokens-{number:05d}.safetensors"
    save_file(tensors, folder / name)
    return {"file": name, "bytes": (folder / name).stat().st_size, "samples": len(samples), "tokens": int(offsets[-1])}
