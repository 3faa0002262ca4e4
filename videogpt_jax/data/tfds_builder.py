"""A TFDS builder whose `download_and_prepare` encodes videos to latents.

    builder = VideogptLatents(config="moving_mnist", data_dir=DIR)
    builder.download_and_prepare()  # fetches the videos, if TFDS can, and encodes them
    source = builder.as_data_source("train")

The folder that it makes, DIR/videogpt/moving_mnist/1.0.0, is what the command `encode` writes:
`config.data.path` of a training run.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict
import tensorflow_datasets as tfds

from videogpt_jax import codec as codec_lib
from videogpt_jax import config as config_lib
from videogpt_jax import encode
from videogpt_jax.data import store
from videogpt_jax.errors import InputError


@dataclasses.dataclass(eq=False)
class Videos(tfds.core.BuilderConfig):
  """Which videos, unless the settings name others: `source` and `videos` of config.data."""

  source: str = "videos"
  videos: str = ""


# Not registered by name: that is how finished data sets of any origin are found in a data_dir.
class VideogptLatents(tfds.core.dataset_builder.FileReaderBuilder,
                      skip_registration=True):  # type: ignore[call-arg]
  """Latents of a set that TFDS fetches (`ucf101`, `moving_mnist`) or of your videos (`folder`).

  Nothing of `GeneratorBasedBuilder` is used: `encode` writes the records itself, goes on where
  it was interrupted, and refuses a folder that was made with other settings.
  """

  name = store.NAME
  VERSION = tfds.core.Version(store.VERSION)
  BUILDER_CONFIGS = [
    Videos(name="folder", description="videos of settings.data.videos"),
    Videos(name="moving_mnist", source="tfds", videos="moving_mnist"),
    Videos(name="ucf101", source="tfds", videos="ucf101/ucf101_1_256"),
  ]

  def __init__(self, *, settings: ConfigDict | None = None, **kwargs: Any):
    """`settings`: see `videogpt_jax.config`, sections data and codec; default: pixels, 64x64."""
    self._settings = ConfigDict((settings or config_lib.default()).to_dict())
    super().__init__(file_format="array_record", **kwargs)

  def __getstate__(self) -> dict[str, Any]:
    """What `__init__` is called with in another process."""
    arguments = super().__getstate__()["_original_state"]
    return {"_original_state": {**arguments, "settings": self._settings}}

  def download_and_prepare(self, **kwargs: Any) -> None:
    """Encodes what is not encoded yet. Takes no arguments.

    Raises:
      InputError: see `encode.encode`.
    """
    if kwargs:
      raise InputError(f"{', '.join(kwargs)}: what is encoded is up to the builder's settings")
    data, preset = self._settings.data, self.builder_config
    if preset.videos:
      data.source, data.videos = preset.source, data.videos or preset.videos
    encode.encode(self._settings, out=self.data_path)
    self.info.read_from_directory(self.data_path)

  def _info(self) -> tfds.core.DatasetInfo:
    codec = config_lib.codec(self._settings)
    spec = store.Spec(codec_lib.stored_channels(codec), codec.dtype.name, codec.spec())
    return tfds.core.DatasetInfo(builder=self, features=store.features(spec))

  def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
    raise AssertionError("download_and_prepare does it all")
