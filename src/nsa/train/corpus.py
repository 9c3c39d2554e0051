"""Text files as two strings of bytes, one to train on and one to validate with."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SEPARATOR = b"\0"  # text holds no NUL: a file that does counts as binary
VALIDATION_SHARE = 0.1
NOT_SOURCE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}

Texts = list[tuple[str, bytes]]


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on and to validate with. No file is in both, unless there is only one: then its last tenth validates.

    Attributes:
        train, validation: uint8 ``[bytes]``, files joined by a NUL.
        train_files, validation_files: names relative to the folder that was given.
        skipped: path and reason of each file that could not be read as text.
        fingerprint: hash of both strings; a run resumes only on the corpus it began with.
    """

    train: Tensor
    validation: Tensor
    train_files: tuple[str, ...]
    validation_files: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    fingerprint: str

    def require(self, context: int) -> None:
        """Raise ``ValueError`` unless both parts hold a sequence of ``context`` tokens and the token after it."""
        for name, part in (("train", self.train), ("validation", self.validation)):
            if part.numel() < context + 1:
                raise ValueError(
                    f"the corpus is too short: its {name} part has {part.numel():,} bytes, a context of {context:,} needs "
                    f"at least {context + 1:,}; give more text or a shorter context"
                )


def read_corpus(paths: Sequence[str | os.PathLike[str]] | None = None) -> Corpus:
    """Read files and folders of UTF-8 text and split them by file.

    Which file validates depends on the files' names and sizes only: the same files give the same split anywhere.

    Args:
        paths: files, and folders that are read recursively but for names with a leading dot; None: the standard
            library's source of the running Python, without its tests.

    Raises:
        ValueError: a path that does not exist, or no text at all.
    """
    texts: Texts = []
    skipped: list[tuple[str, str]] = []
    named = _standard_library(skipped) if paths is None else _named_files([Path(p) for p in paths], skipped)
    for name, path in list(named):
        try:
            texts.append((name, _read_text(path)))
        except (OSError, ValueError) as reason:
            skipped.append((str(path), _explain(reason)))
    texts = [(name, text) for name, text in texts if text]
    if not texts:
        what = "the standard library" if paths is None else ", ".join(str(p) for p in paths) or "an empty list"
        raise ValueError(f"the corpus is too short: no text in {what} ({len(skipped)} files skipped)")
    train, validation = _split(texts)
    parts = [SEPARATOR.join(text for _, text in part) for part in (train, validation)]
    digest = hashlib.sha256(b"".join(len(p).to_bytes(8, "little") + p for p in parts)).hexdigest()
    return Corpus(
        train=_as_tensor(parts[0]),
        validation=_as_tensor(parts[1]),
        train_files=tuple(name for name, _ in train),
        validation_files=tuple(name for name, _ in validation),
        skipped=tuple(skipped),
        fingerprint=digest,
    )


def _as_tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)


def _standard_library(skipped: list[tuple[str, str]]) -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    return ((name, path) for name, path in _walk(root, skipped, NOT_SOURCE) if name.endswith(".py"))


def _named_files(paths: list[Path], skipped: list[tuple[str, str]]) -> Iterator[tuple[str, Path]]:
    """Each file once, with its name relative to the folder that was given."""
    seen: set[Path] = set()
    for given in paths:
        if not given.exists():
            raise ValueError(f"data must be files and folders that exist, got {str(given)!r}")
        for name, path in _walk(given, skipped) if given.is_dir() else [(given.name, given)]:
            if path.resolve() not in seen:
                seen.add(path.resolve())
                yield name, path


def _walk(root: Path, skipped: list[tuple[str, str]], but: Collection[str] = ()) -> Iterator[tuple[str, Path]]:
    """Files below ``root``, sorted; folders that can't be listed are noted in ``skipped``, those named in ``but`` are not."""
    found: list[Path] = []
    for folder, folders, files in os.walk(root, onerror=lambda e: skipped.append((str(e.filename), _explain(e)))):
        folders[:] = [f for f in folders if f not in but and not f.startswith(".")]
        found += [Path(folder, f) for f in files if not f.startswith(".")]
    return iter(sorted((path.relative_to(root).as_posix(), path) for path in found))


def _read_text(path: Path) -> bytes:
    if not path.is_file():  # opening a pipe would wait for its writer
        raise ValueError("not a regular file")
    text = path.read_bytes()
    if SEPARATOR in text:
        raise ValueError("binary")
    text.decode("utf-8")
    return text


def _explain(reason: Exception) -> str:
    if isinstance(reason, UnicodeDecodeError):
        return "not UTF-8"
    return (reason.strerror if isinstance(reason, OSError) else None) or str(reason)


def _split(texts: Texts) -> tuple[Texts, Texts]:
    """Files in the order of their names' hash validate while they stay within their share; at least one does."""
    if len(texts) == 1:
        (name, text), at = texts[0], len(texts[0][1]) - int(len(texts[0][1]) * VALIDATION_SHARE)
        return [(name, text[:at])], [(name, text[at:])]
    room = int(VALIDATION_SHARE * sum(len(text) for _, text in texts))
    chosen: set[int] = set()
    for i in sorted(range(len(texts)), key=lambda i: hashlib.sha256(texts[i][0].encode()).digest()):
        if len(texts[i][1]) <= room:
            room -= len(texts[i][1])
            chosen.add(i)
    if not chosen:
        chosen = {min(range(len(texts)), key=lambda i: len(texts[i][1]))}
    return [t for i, t in enumerate(texts) if i not in chosen], [t for i, t in enumerate(texts) if i in chosen]
