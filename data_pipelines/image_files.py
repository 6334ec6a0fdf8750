"""Images that a row names instead of holding: files under a folder, or in a store's index; never fetched."""

import hashlib
import os
from pathlib import Path

from data_pipelines import image_index, image_store
from data_pipelines.rejection import BadRow
from idefics_jax.errors import UserError

# Reasons for which an image counts as missing.
LOST = ("missing-image", image_store.WRONG_DIGEST)


def check_root(root: str | None, *, where: str) -> None:
    """Looks at where images will be read from, before the first is.

    Args:
      root: as of `read_image`.
      where: opens the message.

    Raises:
      UserError: there is no such folder, or the index in it is damaged.
    """
    if root is not None and not os.path.isdir(root):
        raise UserError(f"{where} is {root!r}, which is no folder; name the folder of the images or of their index")
    if root is not None:
        image_store.opened(root)


def digest(root: str) -> str:
    """Returns a hash of which images there are: of the head of an index, or of all names under a folder.

    No image is read: one that is written over under its name is not seen. A million names take a second or two.
    """
    head = Path(root, image_index.HEAD)
    if head.is_file():
        return hashlib.sha256(head.read_bytes()).hexdigest()
    names = hashlib.sha256()
    for folder, folders, files in os.walk(root, followlinks=True):
        folders.sort()
        names.update(os.fsencode("\0".join([os.path.relpath(folder, root), *sorted(files)])))
    return names.hexdigest()


def read_image(name: str, root: str | None) -> bytes:
    """Returns the bytes of an image that a row names.

    Args:
      name: a path under `root`; or a URL, which is looked up as the file `root`/<SHA-256 of the URL in hex>.
      root: the folder of the images; None if the source has none. If it holds an index of image_store.py, names are
        looked up there alone.

    Raises:
      BadRow: there is no such image, or its path leads out of the folder.
    """
    if root is None:
        raise BadRow("no-image-root", f"it names the image {name!r}; set the source's image_root to the images' folder")
    store = image_store.opened(root)
    if store is not None:
        return store.read(name)
    file = hashlib.sha256(name.encode()).hexdigest() if "://" in name else os.path.normpath(name)
    if os.path.isabs(file) or file.split(os.sep)[0] == os.pardir:
        raise BadRow("outside-image-root", f"the image {name!r} lies outside {root}; move it there")
    try:
        return Path(root, file).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise BadRow("missing-image", f"the image {name!r} is not under {root} ({type(error).__name__})") from error
