"""Recipes: the official lists of public datasets are read, and bad ones are refused by place."""

import re

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


_PANDA = '''videoID,url,timestamp,caption,matching_score
--abc,https://www.youtube.com/watch?v=--abc,"[['0:00:28.528', '0:00:30.230'], ['1:02:03.456', \
'1:02:04.000']]","['A man, ""talking"".', ""It's a dog.""]","[0.43, 0.39]"
x_1,https://www.youtube.com/watch?v=x_1,"[['0:00:00.000', '0:00:01.500']]",['é'],[0.5]
'''


def test_panda70m(tmp_path, monkeypatch):
  path = _write(tmp_path / "panda70m_testing.csv", _PANDA)
  expected = [
    Segment("--abc.mp4", 28.528, 30.23, -1, 'A man, "talking".', ""),
    Segment("--abc.mp4", 3723.456, 3724.0, -1, "It's a dog.", ""),
    Segment("x_1.mp4", 0.0, 1.5, -1, "é", ""),
  ]
  found = listing.read(path, recipe="panda70m")
  assert list(found) == expected
  assert found.names.to_pylist()[1:] == ["--abc.mp4@3723.456-3724", "x_1.mp4@0-1.5"]
  assert found.root == tmp_path
  assert listing.read(path, recipe="panda70m", root=tmp_path.parent).root == tmp_path.parent
  monkeypatch.setattr(columns_lib, "_BATCH", 1)
  assert list(listing.read(path, recipe="panda70m")) == expected


@pytest.mark.parametrize(("old", "new", "message"), [
  ("[['0:00:00.000', '0:00:01.500']]", "[['0:00:00.000', '0:00:01", "row 3: timestamp must be a "
   "list as Python writes it"),
  ("['é']", "é", "row 3: caption must be a list as Python writes it, got 'é'"),
  ("['é']", "", "row 3: caption must be a list"),
  ("['é']", "[3]", "row 3: a caption must be a text, got 3"),
  ("['é']", "['\\ud83d']", "row 3: .*surrogates not allowed"),
  ("['é']", "\"['é', 'f']\"", "row 3: 1 timestamps, but 2 captions"),
  ("'0:00:01.500']", "'1.5']", "row 3: a time must be 'H:MM:SS.mmm', got '1.5'"),
  ("'0:00:01.500']", "'0:00:61.500']", "row 3: a time must be"),
  (", '0:00:01.500']", "]", r"row 3: a timestamp must be a pair .*got \['0:00:00.000'\]"),
  ("'0:00:01.500']", "'0:00:00.000']", "row 3: end .* must be after start"),
  ("x_1,", ",", "row 3: videoID is empty"),
  ("'1:02:03.456', '1:02:04.000'", "'0:00:28.528', '0:00:30.230'", "row 2: .* is listed twice"),
  ("timestamp", "time", "the recipe panda70m expects the columns videoID, timestamp, caption; "
   "timestamp missing, found 'videoID', 'url', 'time', 'caption', 'matching_score'"),
])
def test_bad_rows_of_panda70m(tmp_path, old, new, message):
  assert old in _PANDA
  path = _write(tmp_path / "x.csv", _PANDA.replace(old, new))
  said = _refusal(path, recipe="panda70m")
  assert re.search(message, said), said


def test_a_panda70m_list_without_parts(tmp_path):
  header = _PANDA.splitlines()[0] + "\n"
  path = _write(tmp_path / "x.csv", header)
  assert f"{path} lists no videos" in _refusal(path, recipe="panda70m")
  path = _write(path, header + "a,b,[],[],[]\n")
  assert f"{path} lists no videos" in _refusal(path, recipe="panda70m")


def test_openvid1m(tmp_path):
  header = ("video,caption,aesthetic score,motion score,temporal consistency score,camera motion,"
            "frame,fps,seconds\n")
  path = _write(tmp_path / "OpenVid-1M.data", header +
                'celebv_-0d5.mp4,"A woman, smiling",5.1,7.2,0.99,static,104,25.0,4.16\n'
                "b c.mp4,,5.1,7.2,0.99,pan_left,63.0,29.97,2.1\n")
  found = listing.read(path, recipe="openvid1m")
  assert list(found) == [Segment("celebv_-0d5.mp4", caption="A woman, smiling"), Segment("b c.mp4")]
  assert found.num_frames == 167
  _write(path, header + "a.mp4,x,1,1,1,static,many,25,4\n")
  assert "row 2: frames must be a number, got 'many'" in _refusal(path, recipe="openvid1m")
  _write(path, "video,frame\na.mp4,3\n")
  assert "video, caption, frame; caption missing" in _refusal(path, recipe="openvid1m")


_KINETICS = """label,youtube_id,time_start,time_end,split
testifying,---QUuC4vJs,84,94,validate
air drumming,-0a,0,10,train
zumba,b_c,1233,1243,train
testifying,ddd,5,15,test
"""
_KINETICS_NAMES = ["---QUuC4vJs_000084_000094.mp4", "-0a_000000_000010.mp4",
                   "b_c_001233_001243.mp4", "ddd_000005_000015.mp4"]


@pytest.mark.parametrize(("layout", "folders"), [
  ("{0}", ["", "", ""]),
  ("{1}/{0}", ["validate/", "train/", "train/"]),
  ("{2}/{0}", ["testifying/", "air drumming/", "zumba/"]),
  ("{1}/{2}/{0}", ["validate/testifying/", "train/air drumming/", "train/zumba/"]),
])
def test_kinetics600(tmp_path, layout, folders):
  path = _write(tmp_path / "kinetics600.csv", _KINETICS)
  # The first is missing, as many of the videos are; the second tells the layout.
  _write(tmp_path / "videos" / layout.format(_KINETICS_NAMES[1], "train", "air drumming"), "x")
  found = listing.read(path, recipe="kinetics600", root=tmp_path / "videos")
  assert [s.path for s in found] == [a + b for a, b in zip(folders, _KINETICS_NAMES, strict=False)]
  assert [s.split for s in found] == ["validation", "train", "train"]
  assert [s.label for s in found] == [1, 0, 2]
  assert found.labels == ("air drumming", "testifying", "zumba")
  assert {(s.start, s.end) for s in found} == {(None, None)}  # the files are the parts


def test_kinetics600_test_rows_validate_where_no_others_do(tmp_path):
  rows = _KINETICS.replace("validate", "train")
  path = _write(tmp_path / "x.csv", rows)
  _write(tmp_path / _KINETICS_NAMES[3], "x")
  found = listing.read(path, recipe="kinetics600")
  assert [s.split for s in found] == ["train", "train", "train", "validation"]
  assert found[3].path == _KINETICS_NAMES[3]
  path = _write(path, rows.replace("test\n", "val\n"))
  assert [s.split for s in listing.read(path, recipe="kinetics600")][3] == "validation"


def test_kinetics600_without_labels(tmp_path):
  path = _write(tmp_path / "x.csv", _KINETICS.replace("testifying", ""))
  _write(tmp_path / _KINETICS_NAMES[0], "x")
  found = listing.read(path, recipe="kinetics600")
  assert [s.path for s in found] == _KINETICS_NAMES[:3]
  assert ([s.label for s in found], found.labels) == ([-1, 0, 1], ("air drumming", "zumba"))


@pytest.mark.parametrize(("old", "new", "message"), [
  ("label,", "class,", "recipe kinetics600 expects the columns label, .*; label missing, found "
   "'class'"),
  (",1233,", ",,", "row 4: time_start must be a whole number of seconds from 0, got ''"),
  (",1233,", ",x,", "row 4: time_start must be a number, got 'x'"),
  (",1243,", ",-5,", "row 4: time_end must be a whole number of seconds from 0, got '-5'"),
  ("b_c", "", "row 4: youtube_id is empty"),
  (",validate", ",dev", "row 2: unknown split 'dev'; known are train, validate"),
  (",validate", ",", "row 2: unknown split ''"),
  ("zumba", "", "row 4: label is empty, but the files lie in folders named by it"),
  ("zumba,b_c,1233,1243", "air drumming,-0a,0,10", "row 4: .*-0a_000000_000010.mp4 is "
   "listed twice, first at .*row 3"),
  ("_none_", "", ""),
])
def test_bad_rows_of_kinetics600(tmp_path, old, new, message):
  path = _write(tmp_path / "x.csv", _KINETICS.replace(old, new))
  _write(tmp_path / "air drumming" / _KINETICS_NAMES[1], "x")
  if not message:  # the check of the check: the file as it is is good
    assert len(listing.read(path, recipe="kinetics600")) == 3
    return
  said = _refusal(path, recipe="kinetics600")
  assert re.search(message, said), said


def test_kinetics600_says_where_it_looked(tmp_path):
  path = _write(tmp_path / "x.csv", _KINETICS)
  said = _refusal(path, recipe="kinetics600")
  assert "none of the files of the first 4 rows" in said
  assert _KINETICS_NAMES[0] in said and str(tmp_path) in said
  _write(path, _KINETICS.splitlines()[0] + "\n")
  assert "lists no videos" in _refusal(path, recipe="kinetics600")


_TRAIN = ("Archery/v_Archery_g08_c01.avi 2\r\nApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1\r\n"
          "YoYo/v_YoYo_g08_c01.avi 3\r\n")
_TEST = "YoYo/v_YoYo_g01_c01.avi\r\nArchery/v_Archery_g01_c01.avi\r\n"
_INDEX = "1 ApplyEyeMakeup\r\n2 Archery\r\n3 YoYo\r\n"
_CLASSES = ("ApplyEyeMakeup", "Archery", "YoYo")


def _ucf101(folder, *, train=_TRAIN, test=_TEST, index=_INDEX):
  for name, content in [("trainlist01.txt", train), ("testlist01.txt", test),
                        ("classInd.txt", index)]:
    if content is not None:
      _write(folder / name, content)
  return folder


def test_ucf101_lists(tmp_path):
  folder = _ucf101(tmp_path / "ucfTrainTestlist")
  found = listing.read(folder / "trainlist01.txt", recipe="ucf101")
  assert found[0] == Segment("Archery/v_Archery_g08_c01.avi", None, None, 1, "", "train")
  assert ([s.label for s in found], found.labels) == ([1, 0, 2], _CLASSES)
  assert found.root == folder
  found = listing.read(folder / "testlist01.txt", recipe="ucf101")
  assert found[0] == Segment("YoYo/v_YoYo_g01_c01.avi", None, None, 2, "", "validation")
  assert ([s.label for s in found], found.labels) == ([2, 1], _CLASSES)


def test_ucf101_folders(tmp_path):
  folder = _ucf101(tmp_path / "ucfTrainTestlist")
  (tmp_path / "UCF-101").mkdir()
  found = listing.read(folder, recipe="ucf101")
  assert [s.split for s in found] == 3 * ["train"] + 2 * ["validation"]
  assert [s.label for s in found] == [1, 0, 2, 2, 1]
  assert found.root == tmp_path / "UCF-101"
  assert listing.read(folder / "testlist01.txt", recipe="ucf101").root == tmp_path / "UCF-101"
  assert listing.read(folder, recipe="ucf101", root=tmp_path).root == tmp_path


def test_ucf101_labels_without_an_index(tmp_path):
  folder = _ucf101(tmp_path, index=None)
  found = listing.read(folder, recipe="ucf101")  # the train list knows them
  assert ([s.label for s in found], found.labels) == ([1, 0, 2, 2, 1], _CLASSES)
  found = listing.read(folder / "testlist01.txt", recipe="ucf101")  # their order is all there is
  assert ([s.label for s in found], found.labels) == ([1, 0], ("Archery", "YoYo"))
  _ucf101(tmp_path, train=_TRAIN.replace(" 3", " 9"), index=None)
  found = listing.read(folder / "trainlist01.txt", recipe="ucf101")
  assert ([s.label for s in found], found.labels) == ([1, 0, 8], ())


@pytest.mark.parametrize(("change", "message"), [
  ({"train": "a.avi 1\n"}, "trainlist01.txt, line 1: 'a.avi 1' is not Class/video.avi"),
  ({"train": "A/ 1\n"}, "trainlist01.txt, line 1: 'A/ 1' is not Class/video.avi"),
  ({"test": "New/a.avi\n"}, "testlist01.txt, line 1: the class 'New' has no number"),
  ({"test": "New/a.avi\n", "index": None}, "testlist01.txt, line 1: the class 'New' has no number"),
  ({"test": _TRAIN}, "testlist01.txt, line 1: Archery/.* is listed twice, first at "
                     ".*trainlist01.txt, line 1"),
  ({"train": _TRAIN + "YoYo/b.avi 2\n"}, "trainlist01.txt, line 4: class number 2, but 3 in a "
                                         "line of YoYo before"),
  ({"train": _TRAIN.replace(" 3", " 2"), "index": None}, "two classes have one number"),
  ({"index": "1 Archery\n2 ApplyEyeMakeup\n3 YoYo\n"}, "classInd.txt: .* is class 1, but 2 in the "
                                                       "train list"),
  ({"index": "1 Archery\nYoYo\n"}, "classInd.txt, line 2: 'YoYo' is not the number of a class"),
  ({"test": None}, "cannot read .*testlist01.txt: No such file"),
  ({"train": "", "test": ""}, "lists no videos"),
])
def test_bad_lists_of_ucf101(tmp_path, change, message):
  said = _refusal(_ucf101(tmp_path, **change), recipe="ucf101")
  assert re.search(message, said), said


def test_a_list_of_ucf101_tells_its_split_by_its_name(tmp_path):
  path = _write(tmp_path / "list01.txt", _TRAIN)
  assert "reads trainlist0N.txt, testlist0N.txt" in _refusal(path, recipe="ucf101")
