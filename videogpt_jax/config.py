"""What a configuration is: every default, every check, and what the sections mean.

A file in `configs/` starts from `default()` and states only what differs. The pure
modules never see a `ConfigDict`: the functions at the end turn its sections into the
small frozen dataclasses that those modules take.
"""

import dataclasses
import difflib
from typing import Any

from flax import traverse_util
from ml_collections import ConfigDict

from videogpt_jax import attention
from videogpt_jax import backbone
from videogpt_jax import codec as codec_lib
from videogpt_jax import layout
from videogpt_jax import lora as lora_lib
from videogpt_jax import model as model_lib
from videogpt_jax import objective as objective_lib
from videogpt_jax import optimizer as optimizer_lib
from videogpt_jax import rollout
from videogpt_jax import sampler as sampler_lib
from videogpt_jax import step as step_lib
from videogpt_jax import watchdog
from videogpt_jax.data import fit as fit_lib
from videogpt_jax.errors import InputError
from videogpt_jax.sampler import Sampler


def default() -> ConfigDict:
  """The complete set of settings; a leaf that is not here does not exist."""
  c = ConfigDict()
  c.name = ""
  c.seed = 0
  c.platform = ""  # "" takes jax's default; "cpu", "gpu" or "tpu" demands that one
  c.cpu_devices = 0  # on CPU: devices that the cores are shared among, for `mesh`; 0: one
  c.model = _model()
  c.codec = _codec()
  c.data = _data()
  c.world = _world()
  c.clips = _clips()
  c.train = _train()
  c.optimizer = _optimizer()
  c.lora = _lora()
  c.mesh = _mesh()
  c.checkpoint = _checkpoint()
  c.log = _log()
  c.sample = _sample()
  return c


def _model() -> ConfigDict:
  """The Transformer, and how it is computed."""
  c = ConfigDict()
  c.hidden_size = 128
  c.intermediate_size = 344
  c.num_layers = 4
  c.num_heads = 4
  c.num_kv_heads = 4
  c.patch_size = 2
  c.vocab_size = 4  # rows of embed_tokens; the marker tokens are three of them
  c.img_id = 1
  c.end_img_id = 2
  c.diff_id = 3
  c.pos_embed_max_size = 192
  c.rms_norm_eps = 1e-5
  c.rope_theta = 10000.0
  c.rope_long_factor = ()  # longrope: divisor of each rotary frequency
  c.max_position_embeddings = 4096
  c.dtype = "auto"  # compute type: float32, bfloat16; auto: bfloat16 on accelerators
  c.attention = "auto"  # reference, xla; auto picks by platform and length
  c.remat = "none"  # none, dots, attention, full: from most memory to least
  c.gradients = "compute"  # type in which devices add up gradients: the compute type, float32
  return c


def _codec() -> ConfigDict:
  """How frames become latents."""
  c = ConfigDict()
  c.id = "pixels"  # pixels: folded into channels; vae: latents of an image autoencoder
  c.block = 2  # px of a latent cell's side
  c.channels = 4  # vae: C
  c.scale = 2.0
  c.shift = 0.5
  c.path = "stabilityai/sdxl-vae"  # vae: a folder in diffusers' format, or a hub name
  c.moments = False  # vae: encode stores the posterior's log-variance, too
  c.tile = 512  # vae: px; larger frames are encoded and decoded by overlapping tiles; 0: never
  c.precision = "float16"  # vae: type of stored latents; float16, bfloat16
  return c


def _data() -> ConfigDict:
  """What is encoded, and how samples are cut from it."""
  c = ConfigDict()
  c.path = ""  # the latent data set: written by `encode`, read by `main`; here or on gs://
  c.mixture = ""  # instead: several data sets, "PATH,PATH" or "PATH=WEIGHT,PATH=WEIGHT"
  c.min_bucket = 1  # sizes of which fewer videos are usable are left out of training
  c.posterior = "mean"  # of stored moments; mean, sample, separate (published: one draw a copy)
  c.source = "videos"  # what `encode` reads: "videos", "world", or "tfds"
  c.videos = ""  # a folder of video files, a list of them (txt, tsv, csv, parquet), or a TFDS name
  c.recipe = ""  # how a published list is read: panda70m, openvid1m, kinetics600, ucf101
  c.root = ""  # the folder of a list's relative paths; default: the list's own
  c.height = 64  # frames are resized and centre-cropped to height x width px
  c.width = 64
  c.buckets = ""  # instead: sizes, "176x320,240x320"; a video takes the one most like it
  c.longest_side = 0  # instead: px; proportions stay, sides are cut to multiples of a patch
  c.min_side = 16  # px; smaller source frames are refused
  c.max_aspect = 4.0  # longer over shorter side; more elongated frames are refused
  c.fps = 0.0  # frames a second that are taken, by their times; 0: all frames, as they come
  c.stride = 1  # every stride-th source frame is stored
  c.max_frames = 0  # stored frames per record; longer videos are cut; 0: no limit
  c.scene_cut = 0.0  # change of hue, saturation and value (of 255) that ends a scene; 0: none
  c.decode_timeout = 60.0  # s without a new frame after which a decoder counts as hung
  c.videos_per_shard = 256
  c.validation_fraction = 0.05  # of the videos whose list names no split, by a hash of the name
  c.train_videos = 0  # how many to simulate, source "world"
  c.validation_videos = 0
  c.frames = 16  # N, frames of a training sample
  c.interval = (1, 1)  # frame interval (lo, hi) in source frames, drawn per sample
  c.workers = 0  # grain worker processes
  c.prefetch = 2  # batches kept ready, on the host and on the device
  return c


def _world() -> ConfigDict:
  """The simulated physics world: `videogpt_jax.data.world.Settings`."""
  c = ConfigDict()
  c.size = 32
  c.frames = 8
  c.fps = 8.0
  c.objects = (1, 2)
  c.radius = (4.0, 6.0)  # px
  c.speed = (1.0, 2.0)  # px per frame, initial
  c.spin = 0.0  # radians per frame, at most, initial
  c.gravity = 0.0  # px per frame^2, downwards
  c.shapes = ("ball", "box", "triangle")
  c.elasticity = (1.0,)  # restitution: one value for all, or one for each of the shapes
  c.friction = 0.0
  c.occluder = False
  return c


def _clips() -> ConfigDict:
  """What a training sample is."""
  c = ConfigDict()
  # random (the paper's), one_count (the same, but K is drawn once for all samples of a step: the
  # slowest keeps fewer waiting), single (a frame a clip), fixed (clips.lengths), or continuation
  # (the first sample.history frames are given, the rest is one clip)
  c.partition = "random"
  c.lengths = (1,)  # frames of each clip, partition "fixed"
  c.beta = 0.9  # clean history is at least this clean in training
  return c


def _train() -> ConfigDict:
  """The length and size of training."""
  c = ConfigDict()
  c.steps = 1000
  c.batch_size = 16  # global
  c.accumulation = 1  # microbatches a step
  # In the host's memory between uses: none; optimizer (its moments); activations (what remat
  # "full" keeps of each layer)
  c.offload = "none"
  c.ema_decay = 0.999  # of the averaged parameters that are shown; 0: none are kept
  c.spike = 0.0  # skip updates whose gradients have so many times their typical norm; 0: never
  c.max_bad_steps = 10  # so many updates skipped in a row lead back to the last good checkpoint
  c.max_rollbacks = 3  # without a good checkpoint between them; then training stops
  c.watchdog = 1800.0  # s that a step may take (three times that if it compiles); 0: for ever
  # then: report (write all stacks, wait on), abort (exit, too); auto aborts one of several
  # processes, whose launcher starts them anew
  c.watchdog_action = "auto"
  return c


def _optimizer() -> ConfigDict:
  """AdamW; Muon for the matrices of the stack and AdamW for the rest; or Adafactor."""
  c = ConfigDict()
  c.name = "adamw"  # adamw, muon, adafactor
  c.learning_rate = 1e-3
  c.warmup_steps = 100
  c.cooldown_steps = 0  # linear decay to zero over the last steps; 0: constant
  c.b1 = 0.9
  c.b2 = 0.95
  c.eps = 1e-8
  c.moments = "float32"  # type of the first moment: float32, bfloat16
  c.weight_decay = 0.1
  c.clip_norm = 1.0
  return c


def _lora() -> ConfigDict:
  """Adapters that are trained in place of the model, which stays that of checkpoint.init_from."""
  c = ConfigDict()
  c.rank = 0  # of the adapters; 0: none, all parameters are trained
  c.alpha = 16.0  # what they add is scaled by alpha / rank
  c.targets = lora_lib.TARGETS  # matrices of a layer that have one
  c.base_dtype = "auto"  # the base is kept in: float32, bfloat16; auto: the compute type
  return c


def _mesh() -> ConfigDict:
  """Devices along each axis; -1 takes what is left."""
  c = ConfigDict()
  # Parts with a slower network between them; 0: the slices of a multi-slice TPU job, else one.
  c.slice = 0
  c.data = -1
  c.fsdp = 1
  c.sequence = 1
  c.tensor = 1
  return c


def _checkpoint() -> ConfigDict:
  """What is kept, and what to start from."""
  c = ConfigDict()
  c.every = 500  # steps
  c.keep = 2  # the last ones
  c.keep_every = 0  # those at multiples of so many steps, for ever; 0: none
  c.keep_best = 0  # those with the lowest held-out losses; see log.validate_every
  c.failures = 3  # saves in a row that storage may refuse before training stops
  c.init_from = ""  # workdir or exported weights to start from (not to resume)
  return c


def _log() -> ConfigDict:
  """What is reported, and how often."""
  c = ConfigDict()
  c.every = 20  # steps between lines
  c.validate_every = 500  # steps between held-out losses
  c.validation_batches = 4
  c.rollouts_every = 1000  # steps between scores of rollouts
  c.rollouts = 8  # held-out videos that are rolled out for them; 0: no scores
  c.videos_every = 1000  # steps between rolled-out videos
  c.videos = 4  # of the rollouts, shown; 0: none
  c.wandb = ""  # project of Weights & Biases that is shown the same; "": none
  c.profile_at = 0  # first step of a trace; 0: none but what WORKDIR/profile asks for
  c.profile_steps = 5  # steps of a trace
  return c


def _sample() -> ConfigDict:
  """How videos are rolled out."""
  c = ConfigDict()
  c.history = 4
  c.clip_frames = 4
  c.method = "euler"  # euler, heun, multistep
  c.steps = 20
  c.shift = 1.0
  c.guidance = 1.0
  c.guidance_decay = 0.0  # d; the weight at time t is 1 + (guidance - 1) (1 - t)^d
  c.guidance_range = (0.0, 1.0)  # times between which there is guidance
  c.window = 0  # frames; 0: data.frames
  c.window_mode = "recompute"  # when frames leave: recompute, rolling
  c.history_noise = 0.0  # on generated clips when they become history
  c.redraw_noise = False  # on all of the history, anew for every clip (published)
  return c


def validate(config: ConfigDict) -> None:
  """Checks every value that can be checked without data or devices.

  Raises:
    InputError: the first value that makes no sense, and what would.
  """
  _validate_leaves(config)
  positive = ("model.hidden_size", "model.intermediate_size", "model.num_layers",
              "model.num_heads", "model.num_kv_heads", "model.patch_size", "model.vocab_size",
              "model.pos_embed_max_size", "data.height", "data.width", "data.stride",
              "data.frames", "data.prefetch", "data.min_bucket", "train.steps", "train.batch_size",
              "train.accumulation", "train.max_bad_steps", "optimizer.clip_norm",
              "checkpoint.every", "checkpoint.keep", "log.every", "log.validate_every",
              "log.validation_batches", "log.rollouts_every", "log.videos_every",
              "log.profile_steps", "sample.history", "sample.clip_frames")
  not_negative = ("optimizer.learning_rate", "optimizer.warmup_steps", "optimizer.cooldown_steps",
                  "optimizer.weight_decay", "data.workers", "log.rollouts", "log.videos",
                  "log.profile_at", "sample.window", "train.max_rollbacks", "train.watchdog",
                  "checkpoint.keep_every", "checkpoint.keep_best", "checkpoint.failures")
  for names, fits, wanted in ((positive, lambda x: x > 0, "positive"),
                              (not_negative, lambda x: x >= 0, "at least 0")):
    for name in names:
      if not fits(leaf(config, name)):
        raise InputError(f"config.{name} must be {wanted}, got {leaf(config, name)}")
  _validate_model(config)
  _one_of(config, "optimizer.name", optimizer_lib.NAMES)
  _one_of(config, "optimizer.moments", optimizer_lib.MOMENTS)
  _one_of(config, "data.posterior", step_lib.POSTERIORS)
  _one_of(config, "train.watchdog_action", ("auto", *watchdog.ACTIONS))
  _validate_lora(config)
  codec(config)
  _validate_clips(config)
  if config.train.batch_size % config.train.accumulation:
    raise InputError(f"config.train.batch_size {config.train.batch_size} does not divide into "
                     f"config.train.accumulation {config.train.accumulation} microbatches")
  if config.train.spike and config.train.spike <= 1:
    raise InputError(f"config.train.spike must be 0 or more than 1, got {config.train.spike}")
  if not 0 <= config.train.ema_decay < 1:
    raise InputError(f"config.train.ema_decay must be in [0, 1), got {config.train.ema_decay}")


def _validate_leaves(config: ConfigDict) -> None:
  """Names and types, which flags get right but configuration files may not."""
  known, given = (traverse_util.flatten_dict(tree.to_dict(), sep=".")
                  for tree in (default(), config))
  for name in given.keys() - known.keys():
    nearest = difflib.get_close_matches(name, known, 1, 0.0)[0]
    raise InputError(f"config.{name} does not exist; the nearest that does is config.{nearest}")
  for name, standard in known.items():
    if name not in given:
      raise InputError(f"config.{name} is missing; start from videogpt_jax.config.default()")
    value = given[name]
    if not _alike(value, standard):
      raise InputError(f"config.{name} must be {_kind(standard)}, got {value!r}")
  if len(config.data.interval) != 2:
    raise InputError(f"config.data.interval must be (lo, hi), got {tuple(config.data.interval)}")


def _alike(value: Any, standard: Any) -> bool:
  """Whether a value has the type of the standard one, or one that does as well."""
  if isinstance(standard, tuple):
    kind = standard[0] if standard else 0.0
    return isinstance(value, (tuple, list)) and all(_alike(x, kind) for x in value)
  if isinstance(standard, float):
    return isinstance(value, (float, int)) and not isinstance(value, bool)
  return type(value) is type(standard)


def _kind(standard: Any) -> str:
  if isinstance(standard, tuple):
    return f"a tuple like {standard or (1.0, 2.0)}"
  return {int: "a whole number", float: "a number", str: "text", bool: "True or False"}[
    type(standard)]


def _validate_model(config: ConfigDict) -> None:
  m = config.model
  if (problem := backbone.problem(_stack(config))):
    raise InputError(f"config.model: {problem}")
  for name in ("img_id", "end_img_id", "diff_id"):
    if not 0 <= m[name] < m.vocab_size:
      raise InputError(f"config.model.{name} {m[name]} is no row of a vocabulary of {m.vocab_size}")
  _one_of(config, "model.dtype", ("auto", "float32", "bfloat16"))
  _one_of(config, "model.attention", ("auto", *attention.IMPLEMENTATIONS))
  _one_of(config, "model.remat", ("none", "dots", "attention", "full"))
  _one_of(config, "model.gradients", tuple(backbone.GRADIENTS))
  _one_of(config, "train.offload", step_lib.OFFLOADS)
  if config.train.offload == "activations" and m.remat != "full":
    raise InputError("config.train.offload 'activations' moves what config.model.remat 'full' "
                     f"keeps; remat is {m.remat!r}")
  if config.train.offload == "optimizer" and config.optimizer.name == "adafactor":
    raise InputError("config.train.offload 'optimizer' updates layer by layer, and adafactor clips "
                     "the updates of all layers together; its second moment is small: set "
                     "config.optimizer.moments 'bfloat16', or b1 0, instead")
  fit(config)


def _validate_lora(config: ConfigDict) -> None:
  adapters = config.lora
  _one_of(config, "lora.base_dtype", ("auto", "float32", "bfloat16"))
  if adapters.rank < 0:
    raise InputError(f"config.lora.rank must be at least 0, got {adapters.rank}")
  if not adapters.rank:
    return
  if not adapters.alpha > 0:
    raise InputError(f"config.lora.alpha must be positive, got {adapters.alpha}")
  if not adapters.targets or not set(adapters.targets) <= set(lora_lib.TARGETS):
    raise InputError(f"config.lora.targets must be some of {', '.join(lora_lib.TARGETS)}; got "
                     f"{tuple(adapters.targets)}")
  if not config.checkpoint.init_from:
    raise InputError("config.lora.rank is above 0: adapters need the weights they belong to; give "
                     "config.checkpoint.init_from")
  if config.optimizer.name == "muon":
    raise InputError("config.optimizer.name 'muon' is for whole matrices, not for adapters; use "
                     "'adamw' or 'adafactor' with config.lora.rank")


def _validate_clips(config: ConfigDict) -> None:
  _one_of(config, "clips.partition", ("random", "one_count", "single", "fixed", "continuation"))
  frames, partition = config.data.frames, config.clips.partition
  if partition in ("random", "one_count") and frames < 2:
    raise InputError(f"config.data.frames {frames}: random partitions need at least 2 frames")
  if partition == "fixed" and sum(config.clips.lengths) != frames:
    raise InputError(f"config.clips.lengths {tuple(config.clips.lengths)} sum to "
                     f"{sum(config.clips.lengths)}, config.data.frames is {frames}")
  if partition == "continuation" and config.sample.history >= frames:
    raise InputError(f"config.sample.history {config.sample.history} leaves nothing to predict of "
                     f"config.data.frames {frames}")
  if not 0 <= config.clips.beta <= 1:
    raise InputError(f"config.clips.beta must be in [0, 1], got {config.clips.beta}")
  _validate_sample(config)
  window = config.sample.window or frames
  if config.sample.clip_frames > window:
    raise InputError(f"config.sample.clip_frames {config.sample.clip_frames} does not fit the "
                     f"window of {window} frames")


def _validate_sample(config: ConfigDict) -> None:
  sample = config.sample
  sampler = Sampler(**{field.name: sample[field.name] for field in dataclasses.fields(Sampler)})
  window = rollout.Window(sample.window, sample.window_mode, sample.history_noise,
                          sample.redraw_noise)
  if (problem := sampler_lib.problem(sampler) or rollout.problem(window)):
    raise InputError(f"config.sample.{problem}")


def _one_of(config: ConfigDict, name: str, known: tuple[str, ...]) -> None:
  if leaf(config, name) not in known:
    raise InputError(f"config.{name} is {leaf(config, name)!r}; known: {', '.join(known)}")


def leaf(config: ConfigDict, name: str):
  """The value at a dotted name."""
  for key in name.split("."):
    config = config[key]
  return config


# Sections as what the pure modules take ---------------------------------------------------


def codec(config: ConfigDict) -> codec_lib.Codec:
  """The codec of `config.codec`. Raises `InputError` if it describes none."""
  return codec_lib.from_settings(config.codec.to_dict())


def fit(config: ConfigDict) -> fit_lib.Fit:
  """How frames come to their sizes; raises `InputError` if those do not suit the model."""
  return fit_lib.of(config.data, config.codec.block, config.model.patch_size)


def _stack(config: ConfigDict) -> backbone.Config:
  """The stack of `config.model`, its compute type left out: that would start jax."""
  m = config.model
  same = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads",
          "rms_norm_eps", "rope_theta", "max_position_embeddings", "attention", "remat",
          "gradients")
  return backbone.Config(**{name: m[name] for name in same},
                         rope_long_factor=tuple(m.rope_long_factor))


def model(config: ConfigDict) -> model_lib.Config:
  """The model of `config.model` on the latents of `config.codec`."""
  m = config.model
  stack = dataclasses.replace(_stack(config), dtype=backbone.compute_dtype(m.dtype))
  return model_lib.Config(
      backbone=stack, channels=codec(config).channels, patch_size=m.patch_size,
      vocab_size=m.vocab_size, img_id=m.img_id, end_img_id=m.end_img_id, diff_id=m.diff_id,
      pos_embed_max_size=m.pos_embed_max_size)


def model_differences(ours: model_lib.Config, theirs: model_lib.Config) -> list[str]:
  """One line for each setting but the numerics in which two models differ.

  A setting that has no effect in both (positions that longrope is not made for) may differ.
  """
  lines = []
  for section, other in ((ours, theirs), (ours.backbone, theirs.backbone)):
    for field in dataclasses.fields(section):
      here, there = getattr(section, field.name), getattr(other, field.name)
      if field.name in ("backbone", *backbone.NUMERICS) or here == there:
        continue
      if field.name == "max_position_embeddings" and (
          ours.backbone.rope_scale == theirs.backbone.rope_scale):
        continue
      section_name = "codec" if field.name == "channels" else "model"
      said = ",".join(map(str, there)) if isinstance(there, tuple) else there
      lines.append(f"--config.{section_name}.{field.name}={said} (it is {here!r} here)")
  return lines


def with_model(config: ConfigDict, wanted: model_lib.Config) -> ConfigDict:
  """`config` with the settings of another model: the inverse of `model`, but for numerics."""
  config = ConfigDict(config)
  for name in config.model:
    for settings in (wanted, wanted.backbone):
      if hasattr(settings, name) and name not in backbone.NUMERICS:
        config.model[name] = getattr(settings, name)
  return config


def objective(config: ConfigDict) -> objective_lib.Objective:
  """The training objective of `config.clips`."""
  clips = config.clips
  if clips.partition == "continuation":
    return objective_lib.continuation(config.sample.history, clips.beta)
  if clips.partition == "fixed":
    return objective_lib.fixed(tuple(clips.lengths), clips.beta)
  partition = {
      "random": objective_lib.random_partition,
      "one_count": layout.random_partitions_of_one_count,
      "single": objective_lib.single_partition,
  }[clips.partition]
  return objective_lib.next_clip(partition, clips.beta)


def adapted(config: ConfigDict) -> model_lib.Config:
  """The model that is trained: as `model`, with the adapters of `config.lora` if there are any."""
  plain = model(config)
  if not config.lora.rank:
    return plain
  kind = config.lora.base_dtype
  adapters = lora_lib.Config(
      rank=config.lora.rank, alpha=config.lora.alpha, targets=tuple(config.lora.targets),
      base_dtype=plain.backbone.dtype if kind == "auto" else backbone.compute_dtype(kind))
  return dataclasses.replace(plain, backbone=dataclasses.replace(plain.backbone, lora=adapters))


def recipe(config: ConfigDict) -> step_lib.Recipe:
  """The train step of a configuration."""
  o = config.optimizer
  optimizer = optimizer_lib.Config(
      name=o.name, learning_rate=o.learning_rate, warmup_steps=o.warmup_steps,
      total_steps=config.train.steps, cooldown_steps=o.cooldown_steps, b1=o.b1, b2=o.b2, eps=o.eps,
      weight_decay=o.weight_decay, clip_norm=o.clip_norm, moments=o.moments)
  network = adapted(config)
  if config.train.offload == "activations":
    stack = dataclasses.replace(network.backbone, remat="offload")
    network = dataclasses.replace(network, backbone=stack)
  return step_lib.Recipe(
      model=network, codec=codec(config), objective=objective(config), optimizer=optimizer,
      posterior=config.data.posterior, ema_decay=config.train.ema_decay, spike=config.train.spike,
      accumulation=config.train.accumulation, seed=config.seed, offload=config.train.offload)


def from_saved(saved: dict) -> ConfigDict:
  """A saved configuration over today's defaults; leaves that no longer exist are dropped."""
  config = default()
  for section, values in saved.items():
    if section not in config:
      continue
    if not isinstance(values, dict):
      config[section] = values
      continue
    for name, value in values.items():
      if name in config[section]:
        config[section][name] = tuple(value) if isinstance(value, list) else value
  return config
