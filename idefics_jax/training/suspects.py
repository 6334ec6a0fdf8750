"""Documents of a batch that something went wrong with: the first ones in a sentence, all of them in a file."""

import json
from collections.abc import Sequence

from etils import epath

from idefics_jax.buckets import write_whole

# In the work directory, a file a step.
FOLDER = "suspects"
SHOWN = 8


def named(documents: Sequence[str]) -> str:
    """Returns the first documents of a batch by name, and how many more there are."""
    more = f" and {len(documents) - SHOWN} more" if len(documents) > SHOWN else ""
    return ", ".join(documents[:SHOWN]) + more


def keep(workdir: epath.Path, step: int, what: str, documents: Sequence[str]) -> epath.Path:
    """Writes what happened at a step and all documents of its batch, row after row, as JSON; returns the file."""
    path = workdir / FOLDER / f"step_{step}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({"step": step, "what": what, "documents": list(documents)}, indent=1).encode() + b"\n")
    return path
