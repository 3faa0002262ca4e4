"""The page of a report, in a real browser: Debian's packages chromium and chromium-driver."""

import contextlib
import io
import pathlib
import shutil

from PIL import Image
import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

import example_report
import physics_small
from videogpt_jax.evaluation import physics_iq
from videogpt_jax.evaluation import report as report_lib

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(
  not (BROWSER and DRIVER), reason="no chromium or chromedriver; on Debian, as root: apt-get "
  "update && apt-get install --no-install-recommends chromium chromium-driver")

_ARGUMENTS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
              "--disable-background-networking", "--disable-component-update", "--disable-sync",
              "--window-size=1400,900")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
  options = webdriver.ChromeOptions()
  options.binary_location = BROWSER
  for argument in (*_ARGUMENTS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
    options.add_argument(argument)
  with contextlib.closing(_Driver(webdriver.Chrome(options, Service(DRIVER)))) as driver:
    yield driver


@pytest.fixture(scope="module")
def example(tmp_path_factory):
  folder = tmp_path_factory.mktemp("page with a space & more")
  report_lib.write(example_report.report(folder), folder)
  return folder


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
  """What Physics-IQ wrote of videos as OpenCV writes them, moved away from all it was made of."""
  made = tmp_path_factory.mktemp("made")
  small = physics_small.write(made / "data")
  generated = physics_small.as_opencv_writes(
    physics_small.second_takes(made / "data", made / "takes"), made / "theirs")
  out = made / "out"
  report_lib.write(physics_iq.run(None, out, physics_iq.Options(
    data=str(made / "data"), generated=str(generated), protocol=small, workers=1)), out)
  folder = tmp_path_factory.mktemp("elsewhere") / "published"
  shutil.move(out, folder)
  shutil.rmtree(made)
  return folder


class _Driver:
  """A page opened from disk, from `folder`."""

  folder = pathlib.Path()

  def __init__(self, chrome):
    self.chrome = chrome

  def close(self):
    self.chrome.quit()

  def open(self, folder=None):
    self.folder = folder or self.folder
    self.chrome.get_log("browser")  # of what was open before
    self.chrome.get((self.folder / report_lib.PAGE).as_uri())
    self.run("document.getElementById('settings').scrollIntoView({block: 'end'})")
    return self

  def all(self, selector):
    return self.chrome.find_elements(By.CSS_SELECTOR, selector)

  def run(self, script):
    return self.chrome.execute_script(f"return {script}")

  def used(self):
    """Addresses of all that is loaded; of files `performance` has none."""
    assert not self.all("link, script[src], img, iframe, source")
    return self.run(
      "[...document.querySelectorAll('video')].flatMap(v => [v.currentSrc, v.poster])")

  def wait(self, script):
    WebDriverWait(self.chrome, 30).until(lambda _: self.run(script), script)


@pytest.fixture
def page(browser, example):
  return browser.open(example)


def test_nothing_is_missing_or_from_elsewhere(page):
  page.wait("[...document.querySelectorAll('video')].every(v => v.readyState === 4)")
  assert page.chrome.get_log("browser") == []
  assert page.chrome.title == "A & B"
  used = page.used()
  assert {name.split("/")[-2] for name in used} == {"clips", "posters"}
  assert all(name.startswith(page.folder.as_uri()) for name in used)
  assert [x.text for x in page.all("#videos td.name span")] == ["ball 0 <b>", "ball 1 <b>"]
  assert page.run("[...document.querySelectorAll('video')].map(v => [v.videoWidth, v.duration])"
                  ) == [[16, 0.5]] * 4
  assert not page.run("[...document.querySelectorAll('td.broken')].length")
  assert len(page.all("figure svg")) == 2


def test_tables_show_what_is_best_and_what_is_published(page):
  best = [x.text for x in page.all("#results td.best")]
  assert best == ["0.0123", "20.50", "-0.2500"]
  assert [x.text for x in page.all("#results tr.published td:first-child")] == ["paper"]


def test_a_click_on_a_heading_sorts_and_another_turns_it_round(page):
  page.run("scrollTo(0, 0)")
  names = lambda: [x.text for x in page.all("#results tbody td:first-child")]
  heading = page.all("#results th button")[2]  # PSNR
  heading.click()
  assert names() == ["paper", "ours & theirs", "copy", "blank"]
  heading.click()
  assert names() == ["copy", "ours & theirs", "paper", "blank"]  # what has no value stays last
  page.all("#results th button")[0].click()
  assert names() == ["blank", "copy", "ours & theirs", "paper"]
  videos = lambda: [x.text for x in page.all("#videos td.name span")]
  for _ in range(2):
    page.run("document.querySelector('#videos th.number button').click()")
  assert videos() == ["ball 1 <b>", "ball 0 <b>"]


def test_a_filter_takes_words_and_conditions(page):
  box = page.all("#filter")[0]
  shown = lambda: [x.text for x in page.all("#videos td.name span") if x.is_displayed()]
  for text, expected in (("BALL 1", ["ball 1 <b>"]), ("mse>0.5", ["ball 0 <b>"]),
                         ("ball mse<=1e-3", ["ball 1 <b>"]), ("nothing", [])):
    box.clear()
    box.send_keys(text)
    assert shown() == expected
    assert page.all("#count")[0].text == f"{len(expected)} of 2"


def test_videos_of_a_row_play_in_step_again_and_again(page):
  """Their frames are told apart by their red: 0, 60, 120, 180."""
  page.wait("rows[0].videos.every(v => v.readyState === 4 && !v.paused)")
  page.run("(window.ends = 0, rows[0].videos[0].addEventListener('ended', () => window.ends++))")
  page.wait("window.ends >= 2")
  page.run("(rows[0].videos[1].currentTime = 0.45)")  # put out of step, and it comes back
  page.wait("window.ends >= 4 && rows[0].videos[0].currentTime > 0.2")
  assert page.run("Math.abs(rows[0].videos[0].currentTime - rows[0].videos[1].currentTime)") < 0.06
  page.chrome.find_element(By.TAG_NAME, "body").send_keys(Keys.SPACE)
  page.wait("[...document.querySelectorAll('video')].every(v => v.paused)")
  assert page.all("#play")[0].text == "Play"
  page.run("rows[0].seek(0)")
  for frame in range(1, 4):
    page.chrome.find_element(By.TAG_NAME, "body").send_keys(Keys.ARROW_RIGHT)
    kind = "given" if frame < 2 else "predicted"
    page.wait(f"rows[0].frame.textContent === 'frame {frame + 1} of 4, {kind}'")
    page.wait("rows[0].videos.every(v => !v.seeking)")
    for i in range(2):
      with Image.open(io.BytesIO(page.all("#videos video")[i].screenshot_as_png)) as picture:
        red = picture.convert("RGB").getpixel((picture.width // 2, picture.height // 2))[0]
      assert abs(red - 60 * frame) < 12
  assert "future" in page.all("#videos tbody tr")[0].get_attribute("class")


def test_a_video_that_is_held_stays(page):
  page.wait("rows[0].videos.every(v => v.readyState === 4 && !v.paused)")
  page.run("rows[0].videos[0].click()")
  page.wait("rows[0].videos.every(v => v.paused)")
  assert page.run("rows[1].videos.every(v => !v.paused || v.ended)")
  page.run("document.querySelector('.columns input').click()")
  assert not page.all("#videos video")[0].is_displayed()


def test_a_missing_video_is_said_to_be_missing(page):
  path = page.folder / "clips" / "model #1.mp4"
  kept = path.read_bytes()
  path.unlink()
  try:
    page.open().wait("document.querySelectorAll('td.broken').length === 1")
  finally:
    path.write_bytes(kept)


def test_the_page_of_a_benchmark_plays_where_it_was_moved(browser, benchmark):
  """Every row is scrolled to, since only those in view are loaded."""
  page = browser.open(benchmark)
  assert len(page.all("#videos video")) == 6 * 3 and len(page.all("#videos tbody tr")) == 6
  for i in range(6):
    page.run(f"rows[{i}].element.scrollIntoView({{block: 'center'}})")
    page.wait(f"rows[{i}].videos.every(v => v.readyState >= 2)")
    shown = page.run(f"rows[{i}].videos.map(v => [v.videoWidth, v.duration, v.poster !== ''])")
    assert shown == [[32, 1, True]] * 3
    page.wait(f"rows[{i}].videos.every(v => v.currentTime > 0)")
    assert all(name.startswith(benchmark.as_uri()) for name in page.used() if name)
  assert not page.all("td.broken")
  assert [x.text for x in page.all("figure h3")] == [
    "Spatiotemporal IoU by time", "MSE by time", "Score by category", "Score by scenario"]
  assert page.run("document.documentElement.scrollWidth <= innerWidth")
  assert page.chrome.get_log("browser") == []


def test_the_page_of_a_benchmark_sorts_and_filters(browser, benchmark):
  page = browser.open(benchmark)
  headings = [x.text for x in page.all("#videos th.number button")]
  assert headings == ["spatial IoU", "spatiotemporal IoU", "weighted spatial IoU", "MSE"]
  page.run("document.querySelector('#videos').scrollIntoView()")
  for i, cell in ((0, 5), (3, 8)):  # name and three videos come before
    values = lambda cell=cell: [float(x.text) for x in page.all(
      f"#videos tbody td:nth-child({cell})")]
    before = values()
    for way in (True, False):
      page.all("#videos th.number button")[i].click()
      assert values() == sorted(before, reverse=way)
    assert len(set(before)) > 1
  box = page.all("#filter")[0]
  example = box.get_attribute("placeholder").rpartition(" ")[2]
  assert example == "spatialIoU>0.01"
  for text, count in ((example, 6), ("spatialIoU>1", 0), ("left scene-1", 1)):
    box.clear()
    box.send_keys(text)
    assert page.all("#count")[0].text == f"{count} of 6"
  assert page.chrome.get_log("browser") == []
