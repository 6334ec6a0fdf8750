"""The flag that names a slice: one definition, as several commands of this folder have it."""

from absl import flags

SLICE = flags.DEFINE_string("slice", None, "TPU slice, as v5p-128, or several, as 2xv5e-256")
