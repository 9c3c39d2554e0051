"""Files to bytes: the split, what is skipped, and what is too short."""

import os

import pytest

from nsa.train import read_corpus


def write(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_the_split_is_by_file_disjoint_complete_and_repeatable(text_folder, corpus):
    again = read_corpus([text_folder])
    assert again.fingerprint == corpus.fingerprint
    assert again.train_files == corpus.train_files
    assert not set(corpus.train_files) & set(corpus.validation_files)
    assert sorted(corpus.train_files + corpus.validation_files) == sorted(p.name for p in text_folder.iterdir())
    share = corpus.validation.numel() / (corpus.train.numel() + corpus.validation.numel())
    assert 0 < share <= 0.11
    for part, names in ((corpus.train, corpus.train_files), (corpus.validation, corpus.validation_files)):
        assert bytes(part.tolist()) == b"\0".join((text_folder / name).read_bytes() for name in names)


def test_the_split_depends_on_names_not_on_where_the_folder_is(text_folder, corpus, tmp_path):
    moved = tmp_path / "elsewhere"
    text_folder.rename(moved)
    assert read_corpus([moved]).fingerprint == corpus.fingerprint


def test_a_changed_byte_changes_the_fingerprint(text_folder, corpus):
    file = text_folder / "part03.txt"
    file.write_bytes(b"X" + file.read_bytes()[1:])
    assert read_corpus([text_folder]).fingerprint != corpus.fingerprint


def test_binary_broken_and_unreadable_files_are_skipped_with_the_reason(tmp_path):
    write(tmp_path, a_dot_txt="text " * 50, b_dot_txt="more " * 50, image=b"\x89PNG\0\0", latin=b"caf\xe9 " * 9)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    corpus = read_corpus([tmp_path])
    assert sorted(corpus.train_files + corpus.validation_files) == ["a.txt", "b.txt"]
    reasons = {os.path.basename(path): reason for path, reason in corpus.skipped}
    assert set(reasons) == {"image", "latin", "dangling", "pipe"}
    assert (reasons["image"], reasons["latin"]) == ("binary", "not UTF-8")


def test_a_folder_that_cannot_be_listed_is_noted(tmp_path, monkeypatch):
    write(tmp_path, a_dot_txt="text " * 50, b_dot_txt="more " * 50, locked__c="never read")
    listing = os.scandir

    def scandir(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert read_corpus([tmp_path]).skipped == ((str(tmp_path / "locked"), "Permission denied"),)


def test_hidden_files_are_left_out_and_a_file_given_twice_counts_once(tmp_path):
    write(tmp_path, a_dot_txt="text " * 50, b_dot_txt="more " * 50, _dot_git__config="hidden", _dot_hidden="hidden")
    corpus = read_corpus([tmp_path / "a.txt", tmp_path, tmp_path / "b.txt"])
    assert sorted(corpus.train_files + corpus.validation_files) == ["a.txt", "b.txt"]
    assert corpus.train.numel() + corpus.validation.numel() == 500


def test_of_two_files_the_smaller_validates_and_one_file_is_cut(tmp_path):
    write(tmp_path, big="b" * 900, small="s" * 600)
    corpus = read_corpus([tmp_path])
    assert (corpus.train_files, corpus.validation_files) == (("big",), ("small",))
    corpus = read_corpus([tmp_path / "big"])
    assert (corpus.train.numel(), corpus.validation.numel()) == (810, 90)


def test_the_default_is_the_standard_library_without_its_tests():
    corpus = read_corpus()
    names = corpus.train_files + corpus.validation_files
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    parts = {part for name in names for part in name.split("/")[:-1]}
    assert not parts & {"test", "tests", "site-packages", "dist-packages", "__pycache__"}
    assert all(name.endswith(".py") for name in names)
    assert corpus.train.numel() > 1_000_000


def test_missing_and_empty_corpora_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r"data must be files and folders that exist, got .*nowhere"):
        read_corpus([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="too short: no text in"):
        read_corpus([tmp_path])


def test_a_short_corpus_says_how_much_it_has_and_needs(tmp_path):
    corpus = read_corpus([write(tmp_path, a="a" * 500, b="b" * 65)])
    corpus.require(64)
    with pytest.raises(ValueError, match="its validation part has 65 bytes, a context of 65 needs at least 66"):
        corpus.require(65)
