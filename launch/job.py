"""What runs on a pod, whoever rents it: a command in an image, once on every machine of one or several TPU slices."""

import dataclasses
import re
from collections.abc import Mapping

from absl import flags

from idefics_jax import commands
from idefics_jax.errors import UserError
from launch.slice_flag import SLICE
from launch.slices import Slice, find

# Where the bucket's files are found in the container, for reading.
MOUNT = "/bucket"
# A run that a signal stopped has saved and must be started again; one that a person must look at must not.
STOPPED_STATUS = 75
GIVE_UP_STATUS = commands.USAGE_ERROR
# Set on every machine; a job's own `environment` comes after it. A machine whose TPU is not found must not train on its
# processor.
ENVIRONMENT = {commands.STOPPED_STATUS: str(STOPPED_STATUS), "JAX_PLATFORMS": "tpu,cpu", "PYTHONUNBUFFERED": "1"}
# Google's names are labels of RFC 1035.
_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_LONGEST_NAME = 40  # Kubernetes adds up to 23 more for a pod's

# Adopted by every command that starts jobs.
flags.DEFINE_string("name", None, "name of the job")
flags.DEFINE_string("image", None, "container image, HOST/PROJECT/REPOSITORY/NAME:TAG")
flags.DEFINE_string("bucket", "", f"bucket whose files the command reads under {MOUNT}")
flags.DEFINE_multi_string("env", [], "NAME=VALUE: a variable of the command; may be repeated")
flags.DEFINE_string("service_account", "", "account that may use the bucket; the place's own if not given")
flags.DEFINE_integer("grace_seconds", 600, "from being asked to stop to being killed: two steps and a save")
flags.DEFINE_integer("max_restarts", 100, "how often a run that died or was stopped is started again")
flags.DEFINE_boolean("spot", False, "take cheaper capacity that may be taken away")
flags.DEFINE_boolean("dry-run", False, "print what would be done, and stop")


@dataclasses.dataclass(frozen=True)
class Job:
    """One run on rented slices.

    Attributes:
      name: of the job, and of what is rented for it: lower-case letters, digits and dashes.
      slices: what it runs on.
      image: container image, as docker pulls it.
      command: words of the command that every machine runs.
      bucket: name of the bucket whose files the command reads under /bucket; "" for none.
      environment: variables of the command, besides ENVIRONMENT.
      service_account: that may read and write the bucket, Kubernetes' or Google's as the place wants; "" for its own.
      grace_seconds: time between being asked to stop and being killed, where the machine itself stays that long.
      max_restarts: how often a run that has died or been stopped is started again.
      spot: whether cheaper capacity is asked for that may be taken away.
    """

    name: str
    slices: Slice
    image: str
    command: tuple[str, ...]
    bucket: str
    environment: Mapping[str, str]
    service_account: str
    grace_seconds: int
    max_restarts: int
    spot: bool

    def __post_init__(self):
        if not _LABEL.fullmatch(self.name) or len(self.name) > _LONGEST_NAME:
            raise UserError(
                f"the job's name is {self.name!r}; give at most {_LONGEST_NAME} lower-case letters, digits and dashes, "
                "a letter first"
            )
        if not self.image or set(self.image) & set(" \t\n'\""):
            raise UserError(f"--image is {self.image!r}; give it as docker pulls it, HOST/PROJECT/REPOSITORY/NAME:TAG")
        if not re.fullmatch(r"([a-z0-9][-a-z0-9_.]{1,61}[a-z0-9])?", self.bucket):
            raise UserError(f"--bucket is {self.bucket!r}; give the bucket's name alone, without gs:// and folders")
        for name in ("grace_seconds", "max_restarts"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be 0 or more")

    @property
    def watched_command(self) -> tuple[str, ...]:
        """The command as it is run, so that a machine that has lost another says which (watch.py)."""
        return ("python", "-m", "launch.watch", "--", *self.command)

    @property
    def all_environment(self) -> dict[str, str]:
        """Every variable that the launcher sets."""
        return {**ENVIRONMENT, **self.environment}


def from_flags(command: list[str]) -> Job:
    """Returns the job that the flags describe, of the command's words."""
    given = flags.FLAGS
    return Job(
        name=given.name,
        slices=find(SLICE.value),
        image=given.image,
        command=tuple(command),
        bucket=given.bucket,
        environment=variables(given.env),
        service_account=given.service_account,
        grace_seconds=given.grace_seconds,
        max_restarts=given.max_restarts,
        spot=given.spot,
    )


def variables(given: list[str]) -> dict[str, str]:
    """Returns the environment variables that NAME=VALUE words name.

    Raises:
      UserError: a word is not of that form.
    """
    for word in given:
        if not re.match(r"[A-Za-z_]\w*=", word):
            raise UserError(f"--env {word!r} sets nothing; write it as NAME=VALUE")
    return dict(word.split("=", 1) for word in given)
