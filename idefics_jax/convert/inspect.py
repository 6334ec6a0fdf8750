"""What a folder holds: a table of its tensors, from headers alone."""

from clu import parameter_overview
from etils import epath

from idefics_jax.convert.hf_folder import HfFolder
from idefics_jax.convert.orbax import is_model_folder, model_shapes
from idefics_jax.model import find_model


def describe(path: epath.PathLike) -> str:
    """Returns a table of name, shape, dtype and size, with the total; no weight is read.

    Args:
      path: a Hugging Face folder, a model folder or a work directory.

    Raises:
      UserError: the folder holds no model, or a damaged one.
    """
    path = find_model(path)
    tensors = model_shapes(path) if is_model_folder(path) else dict(HfFolder(path))
    return f"{path}\n{parameter_overview.get_parameter_overview(tensors, include_stats=False)}"
