"""What a run starts from: processor, sizes of the model, and parameters: random, a model's, or pretrained parts.

The sizes are those of the config's `model` section, or else of `init_from`. Weights that start with fewer positions or
a smaller vocabulary are brought to them where the config says how, and refused where it does not.
"""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from idefics_jax import settings, sharding
from idefics_jax.config import PARTS, WITHOUT_FIELD, Idefics2Config
from idefics_jax.convert.parts import open_part, read_sizes
from idefics_jax.errors import UserError
from idefics_jax.model import find_model, load, place
from idefics_jax.param_transforms import new_rows, partition, paths, positions, vocabulary
from idefics_jax.param_tree import boxed_params, param_shapes, param_shardings
from idefics_jax.processor import Processor
from idefics_jax.training.config import TrainConfig

# Sources that write `<end_of_utterance>`; the others do without its row, as the paper's pretraining does.
CONVERSATIONS = ("cauldron", "text")
# Told by a folder, but of no effect on weights that are there.
NO_SIZES = ("extra", "initializer_range", "max_position_embeddings", "image_size", "pad_token_id")


def load_processor(config: TrainConfig) -> Processor:
    """Returns the processor of the config, `image_rules` in the place of its own; raises UserError."""
    return Processor.load(config.processor).with_image_rules(config.image_rules)


def model_config(config: TrainConfig, processor: Processor, *, start: Idefics2Config | None = None) -> Idefics2Config:
    """Returns the sizes of the model that trains.

    Args:
      config: the run's settings.
      processor: its processor.
      start: sizes of the model in `init_from`, where it is yet to be written.

    Raises:
      UserError: there is no model in `init_from`, or the model and the processor do not fit each other.
    """
    tokenizer, rules = processor.tokenizer, processor.image_rules
    if config.model:
        sizes = from_sections(config, image_token_id=tokenizer.image_token_id)
    else:
        sizes = start or Idefics2Config.load(find_model(config.init_from))
        vision, text = sizes.vision_config, sizes.text_config
        if config.resize_positions and vision.positions_per_side != rules.positions_per_side:
            vision = dataclasses.replace(vision, image_size=rules.positions_per_side * vision.patch_size)
        if config.grow_vocabulary != "none":
            text = dataclasses.replace(text, vocab_size=max(text.vocab_size, tokenizer.vocab_size))
        sizes = dataclasses.replace(sizes, vision_config=vision, text_config=text)
    check_processor(config, sizes, processor)
    return sizes


def from_sections(config: TrainConfig, *, image_token_id: int) -> Idefics2Config:
    """Returns the sizes that the config's `model` section tells; the id is used where it tells none.

    Raises:
      UserError: it has no decoder, a name in it is not read, or `Idefics2Config.from_hf` refuses a value.
    """
    if config.model.get("text_config") is None:
        raise UserError("config.model.text_config is missing; add the sizes of the decoder ({} for Mistral 7B's)")
    sizes = Idefics2Config.from_hf({"image_token_id": image_token_id, **config.model, "model_type": "idefics2"})
    for where, part in (("config.model", sizes), *((f"config.model.{name}", getattr(sizes, name)) for name in PARTS)):
        fields = [field.name for field in dataclasses.fields(part) if field.name != "extra"]
        settings.check_names(sorted(set(part.extra) - set(WITHOUT_FIELD)), fields, where)
    return sizes


def check_processor(config: TrainConfig, sizes: Idefics2Config, processor: Processor) -> None:
    """Raises UserError unless the processor's images and tokens fit the model; it names every setting that does not."""
    tokenizer, rules = processor.tokenizer, processor.image_rules
    vision, edge = sizes.vision_config, rules.positions_per_side * rules.patch_size
    talks = any(source.kind in CONVERSATIONS for stage in config.data.stages for source in stage.sources)
    ids = max(sizes.text_config.vocab_size, tokenizer.vocab_size if talks else tokenizer.end_of_utterance_id)
    wrong = [
        f"model.{setting} is {of_model} and must be {of_processor}"
        for setting, of_model, of_processor in (
            ("image_token_id", sizes.image_token_id, tokenizer.image_token_id),
            (
                "perceiver_config.resampler_n_latents",
                sizes.perceiver_config.resampler_n_latents,
                processor.num_latents,
            ),
            ("vision_config.patch_size", vision.patch_size, rules.patch_size),
            ("vision_config.image_size", vision.positions_per_side * vision.patch_size, edge),
            ("text_config.vocab_size", sizes.text_config.vocab_size, ids),
        )
        if of_model != of_processor
    ]
    if wrong:
        raise UserError(
            f"the processor {config.processor!r} does not fit the model: {'; '.join(wrong)}. Change the config's model "
            "section, choose another processor, or let the weights of init_from grow (grow_vocabulary, "
            "resize_positions)"
        )


def initial_params(config: TrainConfig, sizes: Idefics2Config, mesh: Mesh) -> dict[str, Any]:
    """Returns the parameters before the first step, on the mesh, in the dtypes of their files.

    Args:
      config: the run's settings.
      sizes: of the model that trains.
      mesh: current, with the config's sharding rules.

    Raises:
      UserError: a folder is damaged, or its weights do not fit the sizes.
      ValueError: a pattern of `init_std` matches no random parameter.
    """
    rules = sharding.RULES[config.sharding]
    start, params = sizes, {}
    if config.init_from:
        loaded = load(config.init_from, mesh=mesh, rules=rules)
        start, params = loaded.config, loaded.params
    elif config.init_parts:
        start, params = load_parts(config, sizes, mesh)
    check_start(config, start, sizes)
    flat = paths.flatten(param_shardings(sizes, mesh, rules))
    params = fitted(config, params, sizes, flat)
    there = paths.flatten(params)
    missing = paths.unflatten({path: where for path, where in flat.items() if path not in there})
    return partition.combine(params, random_params(config, sizes, missing))


def check_random(config: TrainConfig, shapes: dict[str, Any]) -> None:
    """Checks the patterns of `init_std` against the parameters that no folder gives, without reading one.

    Args:
      config: the run's settings.
      shapes: all parameters of the model, as arrays or shapes.

    Raises:
      ValueError: a pattern is malformed, or matches no random parameter.
    """
    given = tuple(f"{part}/" for part in config.init_parts)
    random = [path for path in paths.flatten(shapes) if not config.init_from and not path.startswith(given)]
    paths.select(dict(config.init_std), random, field="init_std")


def random_params(config: TrainConfig, sizes: Idefics2Config, shardings: dict[str, Any]) -> dict[str, Any]:
    """Returns random parameters where `shardings` has a leaf: the parts' own initialisation, or that of `init_std`."""
    deviation, wanted = dict(config.init_std), paths.flatten(shardings)
    chosen = paths.select(deviation, wanted, field="init_std")

    def init(rng):
        flat = paths.flatten(sharding.unbox(boxed_params(sizes, rng)))
        for index, path in enumerate(sorted(chosen)):
            key = jax.random.fold_in(rng, index)
            flat[path] = jax.random.normal(key, flat[path].shape) * deviation[chosen[path]]
        return paths.unflatten({path: flat[path] for path in wanted})

    return jax.jit(init, out_shardings=shardings)(jax.random.key(config.seed)) if wanted else {}


def load_parts(config: TrainConfig, sizes: Idefics2Config, mesh: Mesh) -> tuple[Idefics2Config, dict[str, Any]]:
    """Reads `init_parts`, and says what of each folder is left out.

    Returns:
      A config with the parts' own sizes, and their parameters on the mesh.
    """
    start = parts_sizes(config, sizes)
    shardings, params = param_shardings(start, mesh, sharding.RULES[config.sharding]), {}
    for part, path in config.init_parts.items():
        leaves, left_out = open_part(path, part, start)
        params |= place(leaves, shardings)
        print(f"{part} from {path}{f', left out: {left_out}' if left_out else ''}", flush=True)
    return start, params


def parts_sizes(config: TrainConfig, sizes: Idefics2Config) -> Idefics2Config:
    """Returns the sizes of the model with those that the folders of `init_parts` tell in the place of its own."""
    own = {f"{part.partition('_')[0]}_config": read_sizes(path, part) for part, path in config.init_parts.items()}
    return dataclasses.replace(sizes, **own, image_token_id=1)  # it may lie beyond the decoder's own vocabulary


def check_weights(config: TrainConfig, sizes: Idefics2Config, *, start: Idefics2Config | None) -> None:
    """Checks that the weights to start from are there and of the model's sizes, without reading one.

    Args:
      config: the run's settings.
      sizes: of the model that trains.
      start: sizes of the model in `init_from`, where it is yet to be written.

    Raises:
      UserError: a folder has no weights, or see `check_start`.
    """
    if config.init_from:
        check_start(config, start or Idefics2Config.load(find_model(config.init_from)), sizes)
    elif config.init_parts:
        begun = parts_sizes(config, sizes)
        for part, path in config.init_parts.items():
            open_part(path, part, begun)
        check_start(config, begun, sizes)


def check_start(config: TrainConfig, start: Idefics2Config, sizes: Idefics2Config) -> None:
    """Raises UserError where the starting weights are not of the model's sizes and nothing says how to mend it."""
    where = config.init_from or ", ".join(config.init_parts.values())
    for noun, ours, wanted, allowed, mend in (
        (
            "positions a side",
            start.vision_config.positions_per_side,
            sizes.vision_config.positions_per_side,
            config.resize_positions,
            "set resize_positions = True to interpolate them",
        ),
        (
            "vocabulary rows",
            start.text_config.vocab_size,
            sizes.text_config.vocab_size,
            config.grow_vocabulary != "none",
            f"set grow_vocabulary to one of {', '.join(vocabulary.STARTS)} to add rows",
        ),
    ):
        if ours != wanted and not allowed:
            raise UserError(f"the weights of {where} have {ours} {noun} and the model {wanted}; {mend}")
    other = settings.differences(_sizes(start), _sizes(sizes))
    if other:
        raise UserError(
            f"the weights of {where} are not of the sizes of config.model ({'; '.join(other)}); correct the config"
        )


def _sizes(config: Idefics2Config) -> dict[str, Any]:
    """Returns what must be equal for weights to be usable: all sizes but those that can be brought to others."""
    whole = dataclasses.asdict(config)
    sections = {name: section for name, section in whole.items() if name.endswith("_config")}
    kept = {name: {k: v for k, v in section.items() if k not in NO_SIZES} for name, section in sections.items()}
    del kept["text_config"]["vocab_size"]
    return {**kept, "tie_word_embeddings": config.tie_word_embeddings}


def fitted(
    config: TrainConfig, params: dict[str, Any], sizes: Idefics2Config, shardings: dict[str, Any]
) -> dict[str, Any]:
    """Brings position and vocabulary tables to the model's sizes; every other leaf is passed through.

    Args:
      config: says how new vocabulary rows start.
      params: loaded parameters.
      sizes: of the model that trains.
      shardings: {path: sharding} of its parameters.
    """
    flat, shapes = paths.flatten(params), paths.flatten(param_shapes(sizes))
    tables = (positions.TABLE, *(f"{module}/{name}" for module, name in new_rows.TABLES.items()))
    short = {path: flat[path] for path in tables if path in flat and flat[path].shape != shapes[path].shape}
    if not short:
        return params

    def fit(tree):
        if positions.TABLE in short:
            tree = positions.resize(tree, sizes.vision_config.positions_per_side)
        rng = jax.random.key(config.seed + 2)
        return vocabulary.grow(tree, sizes.text_config.vocab_size, start=config.grow_vocabulary, rng=rng)

    where = paths.unflatten({path: shardings[path] for path in short})
    return paths.unflatten({**flat, **paths.flatten(jax.jit(fit, out_shardings=where)(paths.unflatten(short)))})
