"""The report as one static page."""

import html
import pathlib

from videogpt_jax.evaluation import report as report_lib


def render(report: report_lib.Report, out: pathlib.Path) -> str:
  """The page, which lies in `out`."""
  del out
  return f"<!doctype html><title>{html.escape(report.title)}</title><pre>" + html.escape(
    report_lib.text(report)) + "</pre>"
