"""Prompts in every format: they are the same prompts, read by index; what is malformed is named by file and line."""

from __future__ import annotations

import hashlib
import os
import random
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from prompt_files import (
    WRITERS,
    opened,
    write_csv,
    write_json_lines,
    write_parquet,
    write_shard,
    write_tar,
    write_text,
)

from diffpp_fast.training import ConfigurationError

PROMPTS = [
    "a red apple",
    'a sign that says "open", at night',
    "un café à Orléans",
    "ein Apfel, rot; zwei Birnen",
    "夜の東京、雨",
    "{not json}, 100 % [true]",
    "a\u2028line separator",
    "an emoji 🍎",
    "a tab\tinside",
    "the last one",
]


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_prompts(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, PROMPTS)
    source = opened(tmp_path / name)
    assert len(source) == len(PROMPTS)
    assert list(source) == PROMPTS
    assert source.digest() == hashlib.sha256("\n".join(PROMPTS).encode()).hexdigest()


@pytest.mark.parametrize("name", WRITERS)
def test_random_access_equals_reading_in_turn(tmp_path: Path, name: str) -> None:
    prompts = [f"prompt {number} {PROMPTS[number % len(PROMPTS)]}" for number in range(50)]
    WRITERS[name](tmp_path / name, prompts)
    source = opened(tmp_path / name)
    chance = random.Random(0)
    for _ in range(20):
        indices = [chance.randrange(50) for _ in range(7)]
        assert source[indices] == [prompts[index] for index in indices]
    assert source[range(10, 20)] == prompts[10:20]
    assert source[[49]] == prompts[49:] and source[[]] == []
    with pytest.raises(IndexError, match="has 50 prompts, asked for 3 to 50"):
        source[[3, 50]]


@pytest.mark.parametrize("name", WRITERS)
def test_a_changed_prompt_or_another_order_changes_the_digest(tmp_path: Path, name: str) -> None:
    digests = set()
    for number, prompts in enumerate((PROMPTS, PROMPTS[::-1], [*PROMPTS[:-1], "another one"], PROMPTS[:-1])):
        folder = tmp_path / str(number)
        folder.mkdir()
        WRITERS[name](folder / name, prompts)
        digests.add(opened(folder / name).digest())
    assert len(digests) == 4


def test_lines_are_stripped_and_blank_ones_skipped(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat\r\n\n  \n\u3000\u00a0\na café  \n\u2003a dog".encode())
    source = opened(path)
    assert list(source) == ["a cat", "a café", "a dog"]
    assert source[[2, 0]] == ["a dog", "a cat"]


def test_lines_are_counted_whatever_is_between_them(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\n\n".join(PROMPTS).encode() + b"\n \n\n")
    assert list(opened(path)) == PROMPTS
    path.write_bytes("\n".join(PROMPTS).encode() + b"\n\n\xff\n")
    with pytest.raises(ConfigurationError, match=rf"line {len(PROMPTS) + 2}, column 1: not UTF-8"):
        opened(path)


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.csv", "prompts.parquet", "dataset", "prompts.tar"])
def test_a_line_break_in_a_prompt_is_a_space(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, ["two\nlines", " and\r\ntwo more ", "one"])
    source = opened(tmp_path / name)
    assert list(source) == ["two lines", "and two more", "one"]
    assert source[[1, 0]] == ["and two more", "two lines"]


def test_blank_lines_in_json_lines_and_csv_are_skipped(tmp_path: Path) -> None:
    lines = tmp_path / "prompts.jsonl"
    lines.write_bytes(b'\xef\xbb\xbf\n{"prompt": "a"}\r\n\n  {"prompt": "b"}  \n\n\n{"prompt": "c"}\n\n')
    table = tmp_path / "prompts.csv"
    table.write_bytes(b'\xef\xbb\xbfprompt,id\r\n\r\n"a",1\r\n\r\n\r\nb,2\r\n"c",3\r\n\r\n')
    for path in (lines, table):
        source = opened(path)
        assert list(source) == ["a", "b", "c"] and source[[2, 0, 1]] == ["c", "a", "b"]


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.csv", "prompts.parquet", "dataset"])
def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, PROMPTS)
    with pytest.raises(ConfigurationError, match=r"no column 'text'|no key 'text'") as error:
        opened(tmp_path / name, column="text")
    assert name in str(error.value) and "prompts.column to one of id, prompt" in str(error.value)


@pytest.mark.parametrize("name", ["prompts.parquet", "dataset"])
def test_a_column_that_is_no_text_is_refused(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, PROMPTS)
    with pytest.raises(ConfigurationError, match="column 'id' holds int64, not text"):
        opened(tmp_path / name, column="id")


@pytest.mark.parametrize("name", ["prompts.parquet", "dataset"])
@pytest.mark.parametrize(("bad", "said"), [(None, "null"), ("", "empty"), (" \u3000 ", "empty")])
def test_null_and_empty_rows_are_named(tmp_path: Path, name: str, bad: str, said: str) -> None:
    WRITERS[name](tmp_path / name, [*PROMPTS[:5], bad, *PROMPTS])
    with pytest.raises(ConfigurationError, match=rf"row 6, column 'prompt': {said}: remove the row"):
        opened(tmp_path / name)


def test_parquet_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    bad = pa.array([b"a cat", b"a caf\xe9"]).view(pa.string())
    pq.write_table(pa.table({"prompt": bad}), tmp_path / "prompts.parquet")
    with pytest.raises(ConfigurationError, match=r"prompts\.parquet, row 2, column 'prompt': not UTF-8"):
        opened(tmp_path / "prompts.parquet")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.txt", b"a cat\n\na caf\xe9 au lait\n", r"p\.txt, line 3, column 6: not UTF-8 \(invalid .*0xe9"),
        ("p.txt", "é ".encode() + b"\xff\n", r"line 1, column 3: not UTF-8"),
        ("p.txt", b"\n \n", "holds no prompt"),
        ("p.txt", b"", "holds no prompt"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "b"\n', r"p\.jsonl, line 2, column 15: Expecting ',' delimiter"),
        ("p.jsonl", b'\n\n  {"prompt": b}\n', r"line 3, column 14: Expecting value"),
        ("p.jsonl", b'{"prompt": "a"} {"prompt": "b"}\n', "line 1, column 16: more after the end of the object"),
        ("p.jsonl", b'{"prompt": "a"}\n["b"]\n', r'line 2: must be a JSON object.*got \["b"\]'),
        ("p.jsonl", b'{"prompt": null}\n', "line 1: 'prompt' must be text, got null"),
        ("p.jsonl", b'{"prompt": 3}\n', "line 1: 'prompt' must be text, got 3"),
        ("p.jsonl", b'{"prompt": " "}\n', "line 1: 'prompt' is empty"),
        ("p.jsonl", b'{"prompt": "\\ud800"}\n', "line 1: 'prompt' holds half of a surrogate pair"),
        ("p.jsonl", b'{"prompt": "a"}\n{}\n', "line 2: no key 'prompt': it has none at all"),
        ("p.jsonl", b'{"prompt": "caf\xe9"}\n', "line 1, column 16: not UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\n' + b"[" * 100_000, "line 2"),
        ("p.jsonl", b"\n", "holds no prompt"),
        ("p.csv", b"prompt,id\na,1\nb, with a comma,2\n", r"p\.csv, line 3: 3 fields, the header has 2"),
        ("p.csv", b"prompt,id\na,1\nb\n", "line 3: 1 fields, the header has 2"),
        ("p.csv", b'prompt,id\n"a\nb",1\n"c" d,2\n', r"line 4: ',' expected after '\"'; look at the quotes"),
        ("p.csv", b'prompt,id\na,1\n"b,2\nc,3\n', "line 3: unexpected end of data; look at the quotes"),
        ("p.csv", b'prompt,id\n"a\n\nb",1\n"",2\n', "line 5, column 'prompt': empty"),
        ("p.csv", b"prompt,id\na,1\ncaf\xe9,2\n", "line 3, column 4: not UTF-8"),
        ("p.csv", b"prompt,id\n", "holds no prompt"),
        ("p.csv", b"", "no column 'prompt': it has none at all"),
        ("p.parquet", b"PAR1 and nothing else", r"can't read .*p\.parquet"),
        ("p.arrow", b"nothing", r"can't read .*p\.arrow"),
        ("p.csv", b"prompt,id\na,1\nprompt,id\nb,2\n", "line 3: the header stands here again"),
        ("p.csv", b'prompt\n"a\0b"\n', "line 2: it holds a NUL character"),
        ("p.jsonl", b'{"prompt": "a\\u0000b"}\n', "line 1: it holds a NUL character"),
        ("p.jsonl", b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}\n", "line 1: Exceeds the limit"),
        ("p.txt", b"a\nb\0c\n", "line 2: it holds a NUL character"),
        ("p.txt", "a cat\n".encode("utf-16"), "is UTF-16 or UTF-32: save it as UTF-8"),
        ("p.txt", "a cat\n".encode("utf-16-le"), "line 1: it holds a NUL character: the file is UTF-16"),
        ("p.csv", "prompt\na cat\n".encode("utf-16"), "is UTF-16 or UTF-32: save it as UTF-8"),
        ("p.txt", b"a\nb\n" + b"c" * (6 << 20), "line 3: longer than 1 MiB"),
        ("p.jsonl", b'{"prompt": "a"}\r{"prompt": "' + b"c" * (2 << 20), "line 2: longer than 1 MiB"),
        ("p.csv", b"prompt\na\n" + b"c" * (2 << 20), "line 3: longer than 1 MiB"),
        ("p.tar", b"", "ends at byte 0 without an end mark: it is truncated"),
        ("p.tar", b"\x1f\x8b" + bytes(600), "no tar header at byte 0: it is damaged, compressed or no tar archive"),
    ],
)
def test_what_is_malformed_is_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=said) as error:
        opened(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_a_tar_that_is_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.tar"
    write_shard(path, PROMPTS)
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1]
    end = last.offset_data + 512  # where the archive's end mark begins
    for length in (end, last.offset_data + 2, last.offset_data, last.offset + 100, last.offset, 512, 100):
        os.truncate(path, length)
        with pytest.raises(ConfigurationError, match=r"prompts\.tar ends at byte \d+.* it is truncated"):
            opened(path)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_archives_of_all_formats_are_read_like_tarfile_does(tmp_path: Path, format: int) -> None:
    long = "folder/" * 12 if format == tarfile.USTAR_FORMAT else "folder/" * 60
    names = ["a.txt", f"{long}b.txt", "c.jpg", "c.seg.txt", "é/d.txt", f"{long}e.jpg", "f.txt"]
    write_tar(tmp_path / "p.tar", [(name, f"a prompt in {name[-5:]}\n".encode()) for name in names], format)
    with tarfile.open(tmp_path / "p.tar", "a") as archive:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE):
            other = tarfile.TarInfo("g.txt")
            other.type = kind
            archive.addfile(other)
    assert list(opened(tmp_path / "p.tar")) == [f"a prompt in {name}" for name in ("a.txt", "b.txt", "d.txt", "f.txt")]


def test_sizes_beyond_octal_digits_are_read(tmp_path: Path) -> None:
    picture, text = tarfile.TarInfo("big.jpg"), tarfile.TarInfo("big.txt")
    picture.size, text.size = 2**35, 5
    with open(tmp_path / "sparse.tar", "wb") as file:
        file.write(picture.tobuf(tarfile.GNU_FORMAT))
        file.seek(512 + 2**35)
        file.write(text.tobuf(tarfile.GNU_FORMAT) + b"a cat".ljust(512, b"\0") + bytes(1024))
    assert list(opened(tmp_path / "sparse.tar")) == ["a cat"]


CR_AND_MARKS = "\ufeffa red apple\r\ufeffa green frog\ra blue\u2028whale\r"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", CR_AND_MARKS),
        ("p.txt", CR_AND_MARKS.replace("\r", "\r\n")),
        ("p.txt", CR_AND_MARKS.replace("\r", "\n \ufeff \r\r\n")),
        ("p.csv", '\ufeff"prompt",id\ra red apple,1\r\ufeff"a green\rfrog",2\r\r"a blue\u2028whale",3'),
        (
            "p.jsonl",
            '\ufeff{"prompt": "a red apple"}\r\ufeff{"prompt": "a green\\r\\nfrog"}\r{"prompt": "a blue\u2028whale"}',
        ),
    ],
    ids=["text", "both", "mixed", "csv", "json"],
)
def test_carriage_returns_end_lines_and_marks_are_no_part_of_them(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_bytes(content.encode())
    source = opened(tmp_path / name)
    prompts = ["a red apple", "a green frog", "a blue\u2028whale"]
    assert list(source) == prompts and source[[2, 1, 0]] == prompts[::-1]


def test_a_line_end_that_a_buffer_ends_in_is_one(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    for size in range(8188, 8194):
        path.write_bytes(b"a" * size + b"\r\n\xc3\xa9\r\n" + b"b\xff")
        with pytest.raises(ConfigurationError, match="line 3, column 2: not UTF-8"):
            opened(path)


@pytest.mark.parametrize("separator", ["\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029"])
@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.jsonl"])
def test_unicode_separators_are_part_of_a_prompt(tmp_path: Path, name: str, separator: str) -> None:
    prompt = f"a red{separator}apple"
    WRITERS[{"p.txt": "prompts.txt", "p.csv": "prompts.csv", "p.jsonl": "prompts.jsonl"}[name]](
        tmp_path / name, [prompt]
    )
    assert list(opened(tmp_path / name)) == [prompt]


def test_members_of_any_name_hold_prompts(tmp_path: Path) -> None:
    """By the last suffix, in any case; another text of a sample, and what macOS adds, are none."""
    names = ["A.TXT", "photo.v2.0001.txt", "x.jpg", "x.tags.txt", "x.txt", "dir.a/y.txt", "._x.txt", "dir/._y.txt"]
    write_tar(tmp_path / "p.tar", [(name, name.encode()) for name in names])
    assert list(opened(tmp_path / "p.tar")) == ["A.TXT", "photo.v2.0001.txt", "x.txt", "dir.a/y.txt"]


def header(size: bytes, kind: bytes = b"0") -> bytes:
    block = bytearray(tarfile.TarInfo("a.txt").tobuf(tarfile.USTAR_FORMAT))
    block[124:136], block[156:157], block[148:156] = size.ljust(12, b"\0"), kind, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    "content",
    [
        header(b"-1000"),
        header(b"\xff" * 12),
        header(b"1_0"),
        *(header(b"12", b"x") + record.ljust(512, b"\0") for record in
          (b"0 size=3\n", b" size=3\n", b"5 a=", b"-9 size=3\n", b"99999999999999999999999 a=1\n", b"10 size=-3\n")),
        header(b"77777777777", b"x"),
        header(b"70000000", b"L"),
    ],
    ids=range(11),
)  # fmt: skip
def test_hostile_archives_are_refused_and_not_read_for_ever(tmp_path: Path, content: bytes) -> None:
    with (tmp_path / "p.tar").open("wb") as file:
        file.write(content + header(b"0"))
        file.truncate(1 << 34)  # sparse
    with pytest.raises(ConfigurationError, match=r"p\.tar.*(damaged|truncated|empty|NUL)"):
        opened(tmp_path / "p.tar")


@pytest.mark.parametrize("path", ["p{0..999999999999}.txt", "p" + "{a,b}" * 60 + ".txt", "p{0..9" + "9" * 5000 + "}"])
def test_braces_stand_for_so_many_files_at_most(tmp_path: Path, path: str) -> None:
    with pytest.raises(ConfigurationError, match=r"No such file|more than 100000"):
        opened(tmp_path / path)


def test_json_members_serve_by_key_or_where_there_are_no_text_members(tmp_path: Path) -> None:
    both, alone = tmp_path / "both.tar", tmp_path / "alone.tar"
    recaptioned = [("1.txt", b"a cat"), ("1.json", b'{"caption": "a black cat"}')]
    write_tar(both, recaptioned)
    write_tar(alone, [("1.jpg", b"-"), ("1.json", b'{"prompt": "a dog"}')])
    assert list(opened(both)) == ["a cat"]
    assert list(opened(both, column="caption")) == ["a black cat"]
    assert list(opened(alone)) == ["a dog"]
    with pytest.raises(ConfigurationError, match=r"both\.tar, member 1\.json: no key 'captoin'"):
        opened(both, column="captoin")


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([("1.txt", b"a"), ("2.txt", b" \n")], r"p\.tar, member 2\.txt: empty"),
        ([("1.txt", b"caf\xe9")], r"member 1\.txt, byte 4: not UTF-8"),
        ([("1.json", b'{"prompt": ')], r"member 1\.json, column 11: Expecting value"),
        ([("1.jpg", b"-")], "holds no .txt or .json members"),
    ],
)
def test_malformed_members_are_named(tmp_path: Path, members: list[tuple[str, bytes]], said: str) -> None:
    write_tar(tmp_path / "p.tar", members)
    with pytest.raises(ConfigurationError, match=said):
        opened(tmp_path / "p.tar")


@pytest.mark.parametrize(
    ("write", "suffix"), [(write_text, "txt"), (write_json_lines, "jsonl"), (write_csv, "csv"),
                          (write_parquet, "parquet"), (write_shard, "tar")]
)  # fmt: skip
@pytest.mark.parametrize("pattern", ["", "part-{08..10}.SUFFIX", "part-*.SUFFIX", "{part,none}-{08,09,10}.SUFFIX"])
def test_shards_by_folder_braces_and_wildcards(
    tmp_path: Path, write: Callable[..., None], suffix: str, pattern: str
) -> None:
    parts = [PROMPTS[:4], PROMPTS[4:5], PROMPTS[5:]]
    for number, part in zip(("08", "09", "10"), parts, strict=True):
        write(tmp_path / f"part-{number}.{suffix}", part)
    (tmp_path / ".hidden.csv").touch()
    path = f"{tmp_path}/{pattern.replace('SUFFIX', suffix)}"
    if "none" in pattern:
        with pytest.raises(ConfigurationError, match=rf"can't read .*none-08\.{suffix}: No such file"):
            opened(path)
        return
    source = opened(path)
    assert list(source) == PROMPTS
    assert source[[9, 0, 4, 3, 5]] == [PROMPTS[index] for index in (9, 0, 4, 3, 5)]
    assert source.digest() == hashlib.sha256("\n".join(PROMPTS).encode()).hexdigest()


def test_arrow_files_and_splits_of_datasets(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_dict({"caption": PROMPTS})
    # A selection, whose rows are not those of the file in order.
    datasets.DatasetDict(train=rows.select([3, 1, 2]), test=rows).save_to_disk(tmp_path / "both")
    assert list(opened(tmp_path / "both" / "train", column="caption")) == [PROMPTS[3], PROMPTS[1], PROMPTS[2]]
    arrow = next((tmp_path / "both" / "test").glob("*.arrow"))
    assert list(opened(arrow, column="caption")) == PROMPTS
    with pytest.raises(ConfigurationError, match="holds the splits test, train: name one"):
        opened(tmp_path / "both", column="caption")


def test_categories_and_large_strings_are_text(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for kind in (pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        pq.write_table(pa.table({"prompt": pa.array(PROMPTS).cast(kind)}), tmp_path / "p.parquet")
        assert list(opened(tmp_path / "p.parquet")) == PROMPTS


def test_paths_that_say_nothing_of_a_format(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"can't read .*nothing\.txt: No such file"):
        opened(tmp_path / "nothing.txt")
    with pytest.raises(ConfigurationError, match=r"can't read .*nothing-\*\.txt: No such file"):
        opened(tmp_path / "nothing-*.txt")
    write_text(tmp_path / "prompts.lst", PROMPTS)
    with pytest.raises(ConfigurationError, match=r"can't tell the format of .*prompts\.lst .*set prompts\.format"):
        opened(tmp_path / "prompts.lst")
    assert list(opened(tmp_path / "prompts.lst", format="text")) == PROMPTS
    write_shard(tmp_path / "1.tar", PROMPTS)
    write_parquet(tmp_path / "1.parquet", PROMPTS[:3])
    with pytest.raises(ConfigurationError, match=r"files of the formats parquet, webdataset: set prompts\.format"):
        opened(tmp_path)
    assert list(opened(tmp_path, format="webdataset")) == PROMPTS
    with pytest.raises(ConfigurationError, match=r"holds no \.csv or \.tsv file"):
        opened(tmp_path, format="csv")


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl", "prompts.csv", "prompts.parquet", "prompts.tar"])
def test_a_file_that_changes_under_a_run_is_refused_and_one_that_is_touched_is_not(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, PROMPTS)
    source = opened(tmp_path / name)
    for _ in range(2):
        os.utime(tmp_path / name, ns=(1, 1))
        assert source[[0, 2]] == [PROMPTS[0], PROMPTS[2]]
        WRITERS[name](tmp_path / name, PROMPTS)  # written anew, with the same prompts
    assert list(source) == PROMPTS
    source = opened(tmp_path / name)
    WRITERS[name](tmp_path / name, PROMPTS[::-1])
    os.utime(tmp_path / name, ns=(0, 0))
    with pytest.raises(ConfigurationError, match=rf"{name} has changed since it was opened"):
        source[[0]]


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "prompts.txt", PROMPTS)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ConfigurationError, match=r"prompts\.txt can't be read without datasets: pip install .*\[train\]"
    ):
        opened(tmp_path / "prompts.txt")
