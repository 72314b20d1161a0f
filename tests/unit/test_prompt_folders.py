"""Which files of a dataset's folder are read: splits and configurations by whole words, nothing that is hidden, and all of it said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_opd.data.prompt_files import find_files
from megatron_opd.data.prompts import read_prompts
from megatron_opd.errors import UserError


def make(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"prompt": name}) + "\n")
    return folder


def taken(folder: Path) -> list[str]:
    return [str(file.relative_to(folder)) for file in find_files(folder).files]


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (["algebra.jsonl", "constraints.jsonl"], ["algebra.jsonl", "constraints.jsonl"]),
        (["default/test/0000.jsonl", "default/train/0000.jsonl"], ["default/train/0000.jsonl"]),
        (["default/Test/0000.jsonl", "default/TRAIN/0000.JSONL"], ["default/TRAIN/0000.JSONL"]),
        (["data/test.jsonl", "data/train.jsonl"], ["data/train.jsonl"]),
        (["train.jsonl", ".ipynb_checkpoints/train-checkpoint.jsonl", ".cache/huggingface/train.jsonl", ".train.jsonl"], ["train.jsonl"]),
        ([".cache/x/train.jsonl", "a.jsonl", "__MACOSX/a.jsonl"], ["a.jsonl"]),
        (["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl"],
         ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"]),
        (["math_train.jsonl", "code_train.jsonl", "math_test.jsonl"], ["code_train.jsonl", "math_train.jsonl"]),
        (["gsm8k.Train.jsonl", "gsm8k.Test.jsonl"], ["gsm8k.Train.jsonl"]),
        (["test.jsonl"], ["test.jsonl"]),
        (["contest.jsonl", "latest.jsonl", "strain.jsonl", "retrained.jsonl"], ["contest.jsonl", "latest.jsonl", "retrained.jsonl", "strain.jsonl"]),
        (["main/train.jsonl", "main/test.jsonl", "socratic/test.jsonl"], ["main/train.jsonl"]),
        (["00/a.jsonl", "01/a.jsonl", "part_2/a.jsonl"], ["00/a.jsonl", "01/a.jsonl", "part_2/a.jsonl"]),
        (["a.json", "dataset_info.json", "dataset_infos.json"], ["a.json"]),
        (["train_test.jsonl"], ["train_test.jsonl"]),
        (["train_test.jsonl", "train.jsonl"], ["train.jsonl"]),
    ],
)  # fmt: skip
def test_the_files_that_are_taken(tmp_path: Path, names: list[str], read: list[str]) -> None:
    make(tmp_path, *names)
    assert taken(tmp_path) == read
    assert [prompt.content for prompt in read_prompts(tmp_path)[1]] == read


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["main/train.jsonl", "socratic/train.jsonl"], r"several configurations \(main/, socratic/\); give the folder or file of one"),
        (["train.jsonl", "more/train.jsonl"], r"several configurations \(\./, more/\)"),
        (["algebra/a.jsonl", "geometry/a.jsonl"], r"several configurations \(algebra/, geometry/\)"),
        (["data/train_sft-00000-of-00001.jsonl", "data/train_gen-00000-of-00001.jsonl"], r"several subsets \(train_gen, train_sft\)"),
        (["validation.jsonl", "test.jsonl"], r"several splits and none is 'train' \(test, validation\)"),
        (
            ["algebra.jsonl", "test.jsonl"],
            r"several splits and none is 'train' \(files of no split, test\); give one file or folder: algebra",
        ),
        (["train/dev.jsonl", "other.jsonl"], r"none is 'train' \(files of no split, train and validation\)"),
        (["a.jsonl.gz", "b.jsonl.zst"], r"no .* files in it \(compressed ones are not read: a.jsonl.gz, b.jsonl.zst; unpack them\)"),
        ([".cache/a.jsonl"], "no .* files in it; a JSONL or Parquet file"),
    ],
)
def test_folders_that_leave_a_choice_are_refused(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_prompts(make(tmp_path, *names))


def test_what_was_taken_and_left_is_said(tmp_path: Path) -> None:
    make(tmp_path / "a", "data/train-00000-of-00003.jsonl", "data/train-00001-of-00003.jsonl", "data/test-00000-of-00001.jsonl")
    assert find_files(tmp_path / "a").note == (
        f"{tmp_path}/a: data/train-00000-of-00003.jsonl, data/train-00001-of-00003.jsonl (split train); 2 of 3 shards are there; "
        "not read: data/test-00000-of-00001.jsonl"
    )
    make(tmp_path / "b", *(f"{number}.jsonl" for number in range(6)))
    assert find_files(tmp_path / "b").note == f"{tmp_path}/b: 0.jsonl, 1.jsonl, ... 5.jsonl (6 files)"
    make(tmp_path / "c", "train.parquet", "more.jsonl")
    assert find_files(tmp_path / "c").note == f"{tmp_path}/c: train.parquet (split train); not read: more.jsonl"
    assert find_files(tmp_path / "b/0.jsonl").note == f"{tmp_path}/b/0.jsonl"


def test_a_saved_dataset_of_several_splits(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["test", "train"]}')
    make(tmp_path / "train", "data.jsonl")
    (tmp_path / "train/state.json").write_text('{"_data_files": [{"filename": "data.jsonl"}]}')
    assert taken(tmp_path) == ["train/data.jsonl"]
    assert find_files(tmp_path).note == f"{tmp_path}/train: data.jsonl; of the splits test, train"


@pytest.mark.parametrize("name", ["dataset_dict.json", "state.json"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("", "not JSON"),
        ("[" * 100_000, "nested more than 100 levels"),
        ("[]", "must be a list of names, not None"),
        ('"x"', "must be a list of names"),
        ('{"splits": 3, "_data_files": 3}', "must be a list of names, not 3"),
        ('{"splits": [], "_data_files": []}', r"must be a list of names, not \[\]"),
        ('{"splits": [1], "_data_files": [1]}', r"must be a list of names, not \[1\]"),
        ('{"splits": [null], "_data_files": [{"filename": null}]}', "must be a list of names"),
        ('{"splits": [""], "_data_files": [{"filename": "."}]}', "must be a list of names"),
        ('{"splits": ["a\\u0000b"], "_data_files": [{"filename": "a\\u0000b"}]}', "must be a list of names"),
        ('{"splits": ["../x"], "_data_files": [{"filename": "../x"}]}', "names '../x', which is outside of the folder"),
        ('{"splits": ["/etc/x"], "_data_files": [{"filename": "/etc/x"}]}', "names '/etc/x', which is outside"),
        ('{"splits": ["a", "/etc"], "_data_files": [{"filename": "a/../../x"}]}', "which is outside"),
    ],
)
def test_damaged_listings(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    make(tmp_path, "data.jsonl")
    with pytest.raises(UserError, match=message) as error:
        read_prompts(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/{name}: ")
    assert "\n" not in str(error.value)


def test_listed_files_that_are_missing(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    with pytest.raises(UserError, match=r"data.arrow: no such prompt file"):
        read_prompts(tmp_path)
    (tmp_path / "data.arrow").mkdir()
    with pytest.raises(UserError, match=r"data.arrow: not a file"):
        read_prompts(tmp_path)


def test_links_are_followed_and_one_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    """A download's files may be links into a cache, and folders links to another disk."""
    make(tmp_path / "disk", "a.jsonl")
    make(tmp_path / "set", "test/0.jsonl")
    (tmp_path / "set/train").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/again").symlink_to(tmp_path / "set")
    assert taken(tmp_path / "set") == ["train/a.jsonl"]
    (tmp_path / "disk/b.jsonl").symlink_to(tmp_path / "not_downloaded")
    with pytest.raises(UserError, match=r"set/train/b.jsonl: no such prompt file"):
        read_prompts(tmp_path / "set")
    with pytest.raises(UserError, match="can't be read: File name too long"):
        read_prompts(tmp_path / ("x" * 300))
