"""The one exception a user is meant to read."""


class InputError(ValueError):
  """Bad input: the message says what is wrong, where, and what to do about it.

  Commands print the message alone and exit with status 2 (see `videogpt_jax.cli`);
  any other exception is a defect and keeps its traceback.
  """
