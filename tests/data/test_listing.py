"""Lists of videos: what every source says is in the table, and bad ones are refused by place."""

import dataclasses
import os
import pickle
import re
import tempfile

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from videogpt_jax.data import columns as columns_lib
from videogpt_jax.data import listing
from videogpt_jax.data.listing import Segment
from videogpt_jax.errors import InputError


def _write(path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return path


def _refusal(path, **kwargs):
  with pytest.raises(InputError) as caught:
    listing.read(path, **kwargs)
  return str(caught.value)


def _digest(path, content, **kwargs):
  return listing.read(_write(path, content), **kwargs).digest


# Folders.


def test_a_folder(tmp_path):
  for name in ("b/two words.MP4", "a.avi", "b/été.mkv", "notes.txt"):
    _write(tmp_path / "videos" / name, "x")
  found = listing.read(tmp_path / "videos")
  assert [s.path for s in found] == ["a.avi", "b/two words.MP4", "b/été.mkv"]
  assert found.root == tmp_path / "videos"
  assert found[1] == Segment("b/two words.MP4", None, None, -1, "", "")
  assert found.path(2) == tmp_path / "videos/b/été.mkv"
  assert (len(found), found.labels, found.num_frames) == (3, (), 0)
  assert found.table.schema == listing.SCHEMA
  assert found == listing.of_folder(str(tmp_path / "videos"))


def test_the_digest_of_a_folder_is_that_of_names_and_sizes(tmp_path):
  for folder, name, content in [("a", "v.mp4", "xx"), ("b", "v.mp4", "yy"), ("c", "v.mp4", "xxx"),
                                ("d", "w.mp4", "xx")]:
    _write(tmp_path / folder / name, content)
  digests = {x: listing.of_folder(tmp_path / x).digest for x in "abcd"}
  assert re.fullmatch("[0-9a-f]{16}", digests["a"])
  assert digests["a"] == digests["b"]
  assert len(set(digests.values())) == 3


def test_folders_without_videos_are_refused(tmp_path):
  assert "no video files" in _refusal(tmp_path)
  assert f"no file or folder {tmp_path / 'missing'}" in _refusal(tmp_path / "missing")
  _write(tmp_path / "a.mp4", "x")
  assert "takes no root" in _refusal(tmp_path, root=tmp_path)


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
  try:
    open(os.fsencode(tmp_path) + b"/\xff.mp4", "wb").close()
  except OSError:
    pytest.skip("the file system has no such names")
  assert r"\xff.mp4" in _refusal(tmp_path)


# Text lists.


@pytest.mark.parametrize("suffix", [".txt", ".list", ".tsv", ".TXT"])
def test_a_text_list(tmp_path, suffix):
  path = _write(tmp_path / f"list{suffix}", "\ufeff# a comment\r\n"
                "a b/é ü.mp4\t120\r\n\r\n  \n/data/c.mp4\n#d.mp4\nd#1.mp4 \t 0\n")
  found = listing.read(path)
  assert list(found) == [Segment("a b/é ü.mp4"), Segment("/data/c.mp4"), Segment("d#1.mp4")]
  assert found.table["frames"].to_pylist() == [120, None, 0]
  assert found.num_frames == 120
  assert found.path(0) == tmp_path / "a b/é ü.mp4"
  assert str(found.path(1)) == "/data/c.mp4"


@pytest.mark.parametrize(("content", "message"), [
  ("", "lists no videos"),
  ("# nothing\n\n", "lists no videos"),
  ("a.mp4\nb.mp4\tmany\n", "line 2: after the tab must be the number of frames, .* got 'many'"),
  ("a.mp4\t-3\n", "line 1: .* whole number of at least 0, got '-3'"),
  ("a.mp4\t2.5\n", "line 1: .* got '2.5'"),
  ("a.mp4\t" + 30 * "9", "line 1: .* got '9999"),
  ("a.mp4\t3\t4\n", "line 1: 2 tabs"),
  ("a.mp4\n\t3\n", "line 2: path is empty"),
  ("# one\na.mp4\nb.mp4\na.mp4\t3\n", r"line 4: a.mp4 is listed twice, first at .*x.txt, line 2"),
  (b"a.mp4\n\n\xe9.mp4\n", "line 3: not UTF-8"),
  ("a.mp4\n".encode("utf-16-le"), "line 1: .* NUL"),
])
def test_bad_text_lists_are_refused_by_line(tmp_path, content, message):
  said = _refusal(_write(tmp_path / "x.txt", content))
  assert re.search(message, said), said
  assert str(tmp_path / "x.txt") in said


# Manifests.


_MANIFEST = """path,start,end,label,caption,split,frames
a b.mp4,,,running,"says ""go"", twice",train,100
a b.mp4,0.1,2.5,walking,"two
lines",val,
é.mp4,3,,running,,valid,7
b.mp4,,4,,日本,test,
c.mp4,,,flying,x,validation,
d.mp4,,,,,,
"""


def test_a_csv_manifest(tmp_path):
  found = listing.read(_write(tmp_path / "x.csv", _MANIFEST))
  assert list(found) == [
    Segment("a b.mp4", None, None, 1, 'says "go", twice', "train"),
    Segment("a b.mp4", 0.1, 2.5, 2, "two\nlines", "validation"),
    Segment("é.mp4", 3.0, None, 1, "", "validation"),
    Segment("b.mp4", None, 4.0, -1, "日本", "validation"),
    Segment("c.mp4", None, None, 0, "x", "validation"),
    Segment("d.mp4", None, None, -1, "", ""),
  ]
  assert found.labels == ("flying", "running", "walking")
  assert found.table["frames"].to_pylist() == [100, None, 7, None, None, None]
  assert found.num_frames == 107
  assert found.names.to_pylist() == [
    "a b.mp4", "a b.mp4@0.1-2.5", "é.mp4@3-", "b.mp4@0-4", "c.mp4", "d.mp4"]
  assert [s.name for s in found] == found.names.to_pylist()
  assert found[-1] == found[5]
  with pytest.raises(IndexError):
    found[6]


def test_parquet_and_csv_give_the_same_listing(tmp_path):
  of_csv = listing.read(_write(tmp_path / "x.csv", _MANIFEST))
  table = pa.csv.read_csv(tmp_path / "x.csv", parse_options=pa.csv.ParseOptions(
    newlines_in_values=True))
  assert pa.types.is_floating(table["start"].type)  # else the comparison says less
  pa.parquet.write_table(table, tmp_path / "x.parquet", row_group_size=2)
  assert listing.read(tmp_path / "x.parquet") == of_csv
  names = table["label"].dictionary_encode()
  as_other_types = (table.set_column(3, "label", names)
                    .set_column(0, "path", table["path"].cast(pa.large_string()))
                    .set_column(2, "end", pa.array([float("nan"), 2.5, None, 4, None, None])))
  pa.parquet.write_table(as_other_types, tmp_path / "x.parquet")
  assert listing.read(tmp_path / "x.parquet") == of_csv


def test_columns_are_found_by_name_and_may_be_missing(tmp_path):
  found = listing.read(_write(tmp_path / "x.csv", "\ufeffcaption,path\nNA,null\n"))
  assert list(found) == [Segment("null", caption="NA")]
  pa.parquet.write_table(pa.table({"end": pa.nulls(1), "path": ["a.mp4"]}), tmp_path / "x.parquet")
  assert list(listing.read(tmp_path / "x.parquet")) == [Segment("a.mp4")]


def test_labels_that_are_numbers_stay(tmp_path):
  path = _write(tmp_path / "x.csv", "path,label\na,7\nb,\nc,-1\nd,3.0\n")
  found = listing.read(path)
  assert ([s.label for s in found], found.labels) == ([7, -1, -1, 3], ())
  pa.parquet.write_table(pa.table({"path": ["a", "b"], "label": [5.0, None]}),
                         tmp_path / "x.parquet")
  assert [s.label for s in listing.read(tmp_path / "x.parquet")] == [5, -1]
  found = listing.read(_write(path, "path,label\na,7\nb,ten\n"))  # one name: all are names
  assert ([s.label for s in found], found.labels) == ([0, 1], ("7", "ten"))


@pytest.mark.parametrize(("content", "message"), [
  ("", "is empty; its first row must name the columns"),
  ("path,start\n", "lists no videos"),
  ("file,start\na,1\n", r"no column 'path'.*among 'file', 'start'.*known columns: path, start"),
  ("paths,start\na,1\n", r"no column 'path'.*rename 'paths'\?"),
  ("path,lable\na,1\n", r"unknown column 'lable' \(did you mean 'label'\?\).*known columns: path,"),
  ("path,zzz\na,1\n", r"unknown column 'zzz'; rename or remove it"),
  ("path,path\na,b\n", "two columns are called 'path'"),
  ("path,start\na,1\nb,soon\n", "row 3: start must be a number, got 'soon'"),
  ("path,end\na,1\nb,nan\n", "row 3: end must be a number, got 'nan'"),
  ("path,start\na,-1\n", "row 2: start must be seconds from 0, got -1"),
  ("path,end\na,1e999\n", "row 2: end must be seconds from 0, got inf"),
  ("path,start,end\na,1,2\nb,2,2\n", r"row 3: end \(2 s\) must be after start \(2 s\)"),
  ("path,start,end\na,,0\n", r"row 2: end \(0 s\) must be after start \(0 s\)"),
  ("path,frames\na,\nb,-1\n", "row 3: frames must be at least 0, got -1"),
  ("path,frames\na,1.5\n", "row 2: frames must be a whole number, got '1.5'"),
  ("path,frames\na,1e30\n", "row 2: frames must be a whole number, got '1e30'"),
  ("path,label\na,-2\n", "row 2: label must be at least -1, got -2"),
  ("path,split\na,train\nb,dev\n", "row 3: unknown split 'dev'; known are train, validation, val"),
  ("path,split\na,\n,train\n", "row 3: path is empty"),
  ("path,split\na,\n  ,train\n", "row 3: path is empty"),
  ("path,start\na,\nb,\na,0\n", "row 4: a is listed twice, first at .*x.csv, row 2"),
  ("path,start\na,1\na,2\na,1.0\n", "row 4: a@1- is listed twice, first at .*x.csv, row 2"),
  ("path,start\na,1\nb\n", "not a CSV file in UTF-8: .*Row #3: Expected 2 columns"),
  (b"path,start\n\xe9,1\n", "not a CSV file in UTF-8: .*Row #2"),
  (b"p\xe9ath,start\n", "no column 'path'"),
])
def test_bad_manifests_are_refused_by_row(tmp_path, content, message):
  said = _refusal(_write(tmp_path / "x.csv", content))
  assert re.search(message, said), said
  assert str(tmp_path / "x.csv") in said


@pytest.mark.parametrize(("columns", "message"), [
  ({"paths": ["a"]}, r"no column 'path'.*rename 'paths'\?"),
  ({"path": ["a", None]}, "row 2: path is empty"),
  ({"path": [1]}, "path must be text, got the type int64"),
  ({"path": ["a"], "start": [True]}, "start must be a number, got the type bool"),
  ({"path": ["a", "b"], "start": ["1", "x"]}, "row 2: start must be a number, got 'x'"),
  ({"path": ["a"], "end": [float("inf")]}, "row 1: end must be seconds from 0, got inf"),
  ({"path": ["a"], "frames": [1.5]}, "row 1: frames must be a whole number, got 1.5"),
  ({"path": ["a"], "caption": [3]}, "caption must be text, got the type int64"),
  ({"path": ["a", "a"]}, "row 2: a is listed twice, first at .*row 1"),
  ({"path": pa.array([], pa.string())}, "lists no videos"),
])
def test_bad_parquet_manifests_are_refused_by_row(tmp_path, columns, message):
  pa.parquet.write_table(pa.table(columns), tmp_path / "x.parquet")
  said = _refusal(tmp_path / "x.parquet")
  assert re.search(message, said), said


def test_what_is_no_list_is_refused(tmp_path):
  said = _refusal(_write(tmp_path / "x.parquet", "path\na.mp4\n"))
  assert "x.parquet is not a Parquet file" in said
  said = _refusal(_write(tmp_path / "x.json", "[]"))
  assert "no list of videos by its suffix" in said and ".parquet" in said and "ucf101" in said
  said = _refusal(tmp_path / "x.json", recipe="panda70")
  assert "unknown recipe 'panda70' (did you mean 'panda70m'?)" in said
  path = _write(tmp_path / "x.txt", "a.mp4\n")
  assert "no folder" in _refusal(path, root=tmp_path / "missing")
  assert "reads a list file" in _refusal(tmp_path, recipe="panda70m")
  with pytest.raises(InputError, match="no_such_user"):
    listing.read("~no_such_user/x.txt")


def test_home_and_root(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  _write(tmp_path / "lists/x.txt", "a.mp4\n")
  (tmp_path / "videos").mkdir()
  assert listing.read("~/lists/x.txt").root == tmp_path / "lists"
  assert listing.read("~/lists/x.txt", root="~/videos").root == tmp_path / "videos"
  assert listing.read("~/lists/x.txt", root="~/videos").path(0) == tmp_path / "videos/a.mp4"


def test_the_digest_is_that_of_the_content(tmp_path):
  row = "path,start,end,label,caption,split,frames\na,1,2,3,x,train,4\n"
  digest = _digest(tmp_path / "x.csv", row)
  assert re.fullmatch("[0-9a-f]{16}", digest)
  # Neither the place nor the way of writing matters.
  assert digest == _digest(tmp_path / "other/y.csv", row, root=tmp_path)
  assert digest == _digest(tmp_path / "x.csv", row.replace("1,2,3", "1.0,2.00,3").replace(
    "\n", "\r\n"))
  assert digest == "87955c1398b1d926"  # of every version: what was encoded is known by it
  others = [row.replace(f"{old}", new) for old, new in [
    ("\na,", "\nb,"), ("a,1,", "a,1.5,"), (",2,", ",3,"), (",3,", ",name,"), (",x,", ",y,"),
    ("train", "val"), (",4\n", ",5\n"), (",4\n", ",\n"), (",3,", ",other,")]]
  others += [row + "b,,,,,,\n", row.replace("\na", "\nb,,,,,,\na")]
  digests = {digest} | {_digest(tmp_path / "x.csv", other) for other in others}
  assert len(digests) == 1 + len(others)


def test_a_listing_reaches_other_processes_whole(tmp_path):
  found = listing.read(_write(tmp_path / "x.csv", _MANIFEST))
  assert pickle.loads(pickle.dumps(found)) == found


_TIMES = st.floats(0, 1e6, allow_nan=False).map(lambda x: x or None)
_ROWS = st.tuples(
  st.text("aé日, \"\n#@-.5", min_size=1).filter(str.strip), st.none() | _TIMES,
  st.none() | st.floats(1e-3, 1e5), st.none() | st.integers(0, 2**40),
  st.text("xy é,\"\n"), st.sampled_from(["", "train", "validation"]),
  st.none() | st.integers(0, 2**53))


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(_ROWS, min_size=1, max_size=20, unique_by=lambda row: row[0]))
def test_what_is_written_is_read(rows):
  rows = [(path, start, None if end is None else (start or 0) + end, *rest)
          for path, start, end, *rest in rows]
  columns = dict(zip(listing.SCHEMA.names, map(list, zip(*rows, strict=True)), strict=True))
  table = pa.table(columns, schema=listing.SCHEMA)
  names = [listing.Segment(*row[:-1]).name for row in rows]
  with tempfile.TemporaryDirectory() as folder:
    pa.csv.write_csv(table, f"{folder}/x.csv")
    pa.parquet.write_table(table, f"{folder}/x.parquet")
    if len(set(names)) < len(names):  # a path may look like another's part
      assert "is listed twice" in _refusal(f"{folder}/x.csv")
      return
    of_csv, of_parquet = (listing.read(f"{folder}/{x}") for x in ("x.csv", "x.parquet"))
  assert of_csv == of_parquet
  expected = [Segment(path, start, end, -1 if label is None else label, caption, split)
              for path, start, end, label, caption, split, _ in rows]
  assert list(of_csv) == expected == [of_csv[i] for i in range(len(of_csv))]
  assert of_csv.names.to_pylist() == names
  assert of_csv.table["frames"].to_pylist() == columns["frames"]


def test_rows_are_taken_in_batches(tmp_path, monkeypatch):
  path = _write(tmp_path / "x.csv", _MANIFEST)
  whole = listing.read(path)
  monkeypatch.setattr(columns_lib, "_BATCH", 4)
  found = listing.read(path)
  assert list(found) == list(whole)
  assert found.names.to_pylist() == whole.names.to_pylist()


def test_a_block_may_end_within_a_caption(tmp_path, monkeypatch):
  rows = "".join(f'{i}.mp4,"a\nb\n{i}"\n' for i in range(100))
  path = _write(tmp_path / "x.csv", "path,caption\n" + rows)
  monkeypatch.setattr(columns_lib, "_BLOCK", 64)
  found = list(listing.read(path))
  assert found == [Segment(f"{i}.mp4", caption=f"a\nb\n{i}") for i in range(100)]


def test_the_name_tells_a_part():
  names = [Segment("a@b", start, end).name for start, end in [
    (None, None), (0.0, None), (0.0, 2.0), (None, 2.5), (1.0, None), (1 / 3, 1e6)]]
  assert names == ["a@b", "a@b", "a@b@0-2", "a@b@0-2.5", "a@b@1-",
                   "a@b@0.3333333333333333-1000000"]


def test_segments_and_listings_are_immutable():
  with pytest.raises(dataclasses.FrozenInstanceError):
    Segment("a").path = "b"
  assert listing.RECIPES == ("kinetics600", "openvid1m", "panda70m", "ucf101")
