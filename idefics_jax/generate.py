"""Answers a prompt about images.

    python -m idefics_jax.generate --checkpoint work/digits --image a.png --prompt "what is the digit?"

Several --image flags are shown to the model in their order, before the prompt.
"""

from absl import flags, logging
from etils import epath

from idefics_jax import commands
from idefics_jax.errors import UserError

_CHECKPOINT = commands.define_folder("checkpoint", None, "a work directory, a model folder or a Hugging Face folder")
_IMAGE = flags.DEFINE_multi_string("image", [], "an image file; may be given several times")
_PROMPT = flags.DEFINE_string("prompt", None, "what to ask")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "most tokens of the answer")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 for the likeliest token, else sample")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "sample among the likeliest tokens that hold this probability")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "dtype of the arithmetic")
_TENSOR = commands.define_tensor()
_SEED = flags.DEFINE_integer("seed", 0, "of the sampling", lower_bound=0, upper_bound=2**31 - 1)


def main() -> None:
    logging.set_verbosity(logging.WARNING)
    # Imported here, so that a wrong flag is answered at once.
    import dataclasses

    import jax.numpy as jnp

    import idefics_jax
    from idefics_jax.chat import chat_parts
    from idefics_jax.images import RejectedImage, first_rejected
    from idefics_jax.inference.answer import answers, default_decoding
    from idefics_jax.model import cut_over

    paths = [epath.Path(path) for path in _IMAGE.value]
    for path in paths:
        if not path.is_file():
            raise UserError(f"--image: there is no file {str(path)!r}")
    model = idefics_jax.load(_CHECKPOINT.value, dtype=jnp.dtype(_DTYPE.value), **cut_over(_TENSOR.value))
    if model.processor is None:
        raise UserError(f"{_CHECKPOINT.value} holds no processor (tokenizer.model); copy it there from the base model")
    longest = model.config.text_config.max_position_embeddings
    if not 1 <= _MAX_NEW_TOKENS.value <= longest:
        raise UserError(f"--max_new_tokens is {_MAX_NEW_TOKENS.value}; it must be at least 1 and at most {longest}")
    content = [*({"type": "image"} for _ in paths), {"type": "text", "text": _PROMPT.value}]
    messages = [{"role": "user", "content": content}]
    images = [path.read_bytes() for path in paths]
    prompt = chat_parts(messages, images, add_generation_prompt=True)
    decoding = dataclasses.replace(
        default_decoding(model.processor, max_new_tokens=_MAX_NEW_TOKENS.value),
        temperature=_TEMPERATURE.value,
        top_p=_TOP_P.value,
    )
    try:
        print(next(answers(model, [prompt], decoding, rows=1, seed=_SEED.value)))
    except RejectedImage as error:
        found = first_rejected(images, model.processor.image_rules)
        raise UserError(f"--image {paths[found[0]]}: {found[1]}" if found else str(error)) from error


if __name__ == "__main__":
    commands.run(main, required=("checkpoint", "prompt"))
