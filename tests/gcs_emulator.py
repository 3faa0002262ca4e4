"""Google Cloud Storage for tests: serves a local folder over HTTP, for reading only.

Speaks what `gcsfs` and ArrayRecord's native reader (google-cloud-cpp) ask for: lists, metadata
and contents in the JSON API, contents in the older XML API too. Nobody has to log in.
"""

from collections.abc import Iterator
import contextlib
import http.server
import json
from pathlib import Path
import re
import threading
from typing import Any
import urllib.parse


class Server(http.server.ThreadingHTTPServer):
  """A bucket for every folder in `root`.

  Attributes:
    requests: (path, the header Range or "") of every request so far, in order.
    forbidden: requests whose path contains it are refused, if it is not empty.
  """

  daemon_threads = True

  def __init__(self, root: Path):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.root = root
    self.requests: list[tuple[str, str]] = []
    self.forbidden = ""

  @property
  def environment(self) -> dict[str, str]:
    """What leads both libraries here, and nowhere else; they read it when they start."""
    url = f"http://127.0.0.1:{self.server_address[1]}"
    return {
      "STORAGE_EMULATOR_HOST": url,  # gcsfs
      "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # else it asks Google for the bucket's kind
      "EPATH_USE_TF": "false",  # else etils takes TensorFlow, where that is installed
      "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,  # google-cloud-cpp
      "no_proxy": "127.0.0.1",
    }


@contextlib.contextmanager
def serve(root: Path) -> Iterator[Server]:
  """Serves the folders in `root` as buckets until the block ends."""
  with Server(root) as server:
    thread = threading.Thread(target=server.serve_forever, name="gcs emulator")
    thread.start()
    try:
      yield server
    finally:
      server.shutdown()
      thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
  server: Server
  protocol_version = "HTTP/1.1"
  disable_nagle_algorithm = True

  def handle(self) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the reader has enough
      super().handle()

  def do_GET(self) -> None:
    self.server.requests.append((self.path, self.headers.get("Range", "")))
    if self.server.forbidden and self.server.forbidden in self.path:
      self._send(403)
      return
    url = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(url.query))
    json_api = re.fullmatch(r"/(?:download/)?storage/v1/b/([^/]+)(?:/o(?:/(.*))?)?", url.path)
    if json_api is None:
      bucket, _, name = url.path[1:].partition("/")
      self._send_media(self._find(bucket, name))
      return
    bucket, name = json_api.groups()
    if name is None:
      self._send_list(bucket, query.get("prefix", ""), query.get("delimiter", ""))
    elif query.get("alt") == "media":
      self._send_media(self._find(bucket, name))
    elif file := self._find(bucket, name):
      self._send_json(_resource(bucket, urllib.parse.unquote(name), file))
    else:
      self._send(404)

  def _find(self, bucket: str, name: str) -> Path | None:
    file = self.server.root / urllib.parse.unquote(bucket) / urllib.parse.unquote(name)
    inside = file.resolve().is_relative_to(self.server.root.resolve())
    return file if inside and file.is_file() else None

  def _send_list(self, bucket: str, prefix: str, delimiter: str) -> None:
    root = self.server.root / bucket
    if not root.is_dir():
      self._send(404)
      return
    items, prefixes = [], set()
    for file in sorted(root.rglob("*")):
      name = file.relative_to(root).as_posix()
      if not file.is_file() or not name.startswith(prefix):
        continue
      head, found, _ = name[len(prefix):].partition(delimiter) if delimiter else (name, "", "")
      if found:
        prefixes.add(prefix + head + found)
      else:
        items.append(_resource(bucket, name, file))
    self._send_json({"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})

  def _send_media(self, file: Path | None) -> None:
    if file is None:
      self._send(404)
      return
    size = file.stat().st_size
    headers = {"x-goog-generation": "1", "x-goog-stored-content-length": str(size)}
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
    first, last = asked.groups() if asked else ("0", "")
    begin = int(first) if first else max(0, size - int(last))  # bytes=-9 are the last nine
    end = min(int(last) + 1, size) if first and last else size
    if begin >= end and asked:
      self._send(416, headers={"Content-Range": f"bytes */{size}"})
      return
    if asked:
      headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
    with open(file, "rb") as content:
      content.seek(begin)
      self._send(206 if asked else 200, content.read(end - begin), headers)

  def _send_json(self, content: dict[str, Any]) -> None:
    self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

  def _send(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None
            ) -> None:
    self.send_response(status)
    for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
      self.send_header(name, value)
    self.end_headers()
    self.wfile.write(content)

  def log_message(self, format: str, *args: Any) -> None:
    del format, args


def _resource(bucket: str, name: str, file: Path) -> dict[str, str]:
  """What the JSON API tells of an object."""
  return {
    "kind": "storage#object",
    "bucket": bucket,
    "name": name,
    "size": str(file.stat().st_size),
    "generation": "1",
    "metageneration": "1",
    "updated": "2024-01-01T00:00:00.000Z",
    "timeCreated": "2024-01-01T00:00:00.000Z",
  }
