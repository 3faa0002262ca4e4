"""The page of a report, in a real browser: Debian's packages chromium and chromium-driver."""

import contextlib
import io
import shutil

from PIL import Image
import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

import example_report
from videogpt_jax.evaluation import report as report_lib

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(
  not (BROWSER and DRIVER), reason="needs a browser: apt-get install chromium chromium-driver")

_ARGUMENTS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
              "--disable-background-networking", "--disable-component-update", "--disable-sync",
              "--window-size=1400,900")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
  folder = tmp_path_factory.mktemp("page with a space & more")
  report_lib.write(example_report.report(folder), folder)
  options = webdriver.ChromeOptions()
  options.binary_location = BROWSER
  for argument in (*_ARGUMENTS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
    options.add_argument(argument)
  with contextlib.closing(_Driver(webdriver.Chrome(options, Service(DRIVER)))) as driver:
    driver.folder = folder
    yield driver


class _Driver:
  """A page opened from disk."""

  def __init__(self, chrome):
    self.chrome = chrome

  def close(self):
    self.chrome.quit()

  def open(self):
    self.chrome.get((self.folder / report_lib.PAGE).as_uri())
    self.run("document.getElementById('settings').scrollIntoView({block: 'end'})")
    return self

  def all(self, selector):
    return self.chrome.find_elements(By.CSS_SELECTOR, selector)

  def run(self, script):
    return self.chrome.execute_script(f"return {script}")

  def wait(self, script):
    WebDriverWait(self.chrome, 30).until(lambda _: self.run(script), script)


@pytest.fixture
def page(browser):
  return browser.open()


def test_nothing_is_missing_or_from_elsewhere(page):
  page.wait("[...document.querySelectorAll('video')].every(v => v.readyState === 4)")
  assert page.chrome.get_log("browser") == []
  assert page.chrome.title == "A & B"
  used = page.run("performance.getEntriesByType('resource').map(x => x.name)")
  assert {name.split("/")[-2] for name in used} <= {"clips", "posters"}
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
