"""A file in a folder that all hosts share, whose appearance or change is a signal to them."""

import os
import pathlib


class SignalFile:
  """Tells once of each time that the file is written.

  What is there already when this is made is old news. Nobody has to remove the file, so no
  host can miss it. A network file system may show it to other hosts some seconds late.
  """

  def __init__(self, path: str | os.PathLike[str]) -> None:
    self.path = pathlib.Path(path)
    self._seen = self._version()

  def news(self) -> str | None:
    """The file's text if it has been written since the last call, else None."""
    version = self._version()
    if version == self._seen:
      return None
    try:
      text = self.path.read_text(encoding="utf-8", errors="replace") if version else None
    except OSError:  # written anew this moment, or gone: the next call tells
      return None
    self._seen = version
    return text

  def forget(self) -> None:
    """Takes what the file holds now as known."""
    self._seen = self._version()

  def _version(self) -> tuple[int, int] | None:
    try:
      found = self.path.stat()
    except OSError:  # not there, or the file system does not answer: no news
      return None
    return found.st_mtime_ns, found.st_ino
