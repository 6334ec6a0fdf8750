"""Holds a JobSet manifest against the published types, of which jobset_v1alpha2.json is a record."""

import json
import re
from pathlib import Path

TYPES = json.loads(Path(__file__).with_name("jobset_v1alpha2.json").read_text())["types"]
SCALARS = {"string": str, "int": int, "bool": bool}


def faults(value, kind="JobSet", where="JobSet"):
    """Returns one line for each field that the published types do not have, lack, or hold another type or word in."""
    if kind.startswith("["):
        if not isinstance(value, list):
            return [f"{where} is no list"]
        return [line for i, item in enumerate(value) for line in faults(item, kind[1:-1], f"{where}[{i}]")]
    if kind == "map":
        good = isinstance(value, dict) and all(isinstance(name, str) for name in value)
        # Quantities of resources may be numbers; every other value of a map is text.
        kinds = (str, int) if where.endswith(".limits") else str
        return [] if good and all(isinstance(item, kinds) for item in value.values()) else [f"{where} is no map"]
    if kind in SCALARS:
        return [] if type(value) is SCALARS[kind] else [f"{where} is {value!r}, not of type {kind}"]
    if kind not in TYPES:
        return [] if kind == "any" or value in kind.split("|") else [f"{where} is {value!r}, none of {kind}"]
    if not isinstance(value, dict):
        return [f"{where} is no {kind}"]
    fields = {name.rstrip("?"): of for name, of in TYPES[kind].items()}
    lines = [f"{where}.{name} is no field of {kind}" for name in value if name not in fields]
    lines += [f"{where}.{name} is missing" for name in TYPES[kind] if name[-1] != "?" and name not in value]
    return lines + [
        line for name in value if name in fields for line in faults(value[name], fields[name], f"{where}.{name}")
    ]


def names(content):
    """Returns the longest name that JobSet's webhook forms of a JobSet for a Job, and for a pod."""
    (replicated,) = content["spec"]["replicatedJobs"]
    job = f"{content['metadata']['name']}-{replicated['name']}-{replicated['replicas'] - 1}"
    return job, f"{job}-{replicated['template']['spec']['completions'] - 1}-abcde"


def is_label(name):
    """Whether a name is a label of RFC 1035."""
    return len(name) <= 63 and re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name) is not None
