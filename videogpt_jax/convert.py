"""Exports a training run: `python -m videogpt_jax.convert --checkpoint=WORKDIR --out=FOLDER`.

The folder gets the EMA weights as safetensors under the published names, and all that
`videogpt_jax.predict` needs beside them.
"""

from absl import flags

from videogpt_jax import checkpoint
from videogpt_jax import cli
from videogpt_jax import config as config_lib
from videogpt_jax import published
from videogpt_jax.errors import InputError

SECTIONS = ("name", "codec", "data", "sample", "world")  # of the run, kept for prediction


def export(workdir: str, out: str, dtype: str = "bfloat16", *, position: bool = True) -> None:
  """Writes the newest checkpoint's EMA weights of `workdir` as a weights folder.

  Args:
    workdir: of the training run.
    out: the folder to write.
    dtype: of the stored tensors.
    position: whether the constant position table is written, as the published code expects.

  Raises:
    InputError: no whole checkpoint there, or the folder cannot be written.
  """
  params, saved = checkpoint.load_params(workdir)
  config = config_lib.from_saved(saved)
  extra = {name: value for name, value in config.to_dict().items() if name in SECTIONS}
  for name in ("path", "videos"):  # where the data lay on the machine that trained
    del extra["data"][name]
  try:
    published.save_folder(out, lambda path: published.leaf(params, path),
                          config_lib.model(config), extra, dtype, position=position)
  except OSError as error:
    raise InputError(f"cannot write weights to {out}: {error}") from error


def main() -> None:
  """Reads the flags and exports."""
  f = flags.FLAGS
  if not f.checkpoint or not f.out:
    raise InputError("--checkpoint=WORKDIR and --out=FOLDER are needed")
  export(f.checkpoint, f.out, f.dtype, position=f.position)
  print(f"wrote {f.out}")


if __name__ == "__main__":
  flags.DEFINE_string("checkpoint", "", "Training workdir.")
  flags.DEFINE_string("out", "", "Folder for model.safetensors and config.json.")
  flags.DEFINE_enum("dtype", "bfloat16", sorted(published.TYPES), "Type of the stored tensors.")
  flags.DEFINE_bool("position", True, "Write the constant position table, as the published code "
                    "expects; nothing here reads it.")
  cli.run(main)
