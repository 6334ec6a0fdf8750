"""Holds commands of gcloud against what its own --help says that they take (gcloud 528.0.0)."""

import json
from pathlib import Path

FLAGS = json.loads(Path(__file__).with_name("gcloud_flags.json").read_text())


def unknown_flags(words):
    """Returns the flags of a gcloud command, given as words, that gcloud has not."""
    assert words[0] == "gcloud"
    name = max((name for name in FLAGS if words[1:][: len(name.split())] == name.split()), key=len)
    given = [word.split("=")[0] for word in words if word.startswith("--")]
    return [flag for flag in given if flag not in FLAGS[name]]
