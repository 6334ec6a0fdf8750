"""The paper's recipes at full size: they build, and train what the paper trained in the shares it tells."""

import functools
import math
from collections.abc import Mapping

import jax
import numpy as np
import pytest

from configs.idefics2_8b import chat, instruct, stage1, stage2
from data_pipelines.filters import Filters
from idefics_jax import sharding
from idefics_jax.batch import batch_spec
from idefics_jax.config import Idefics2Config
from idefics_jax.errors import UserError
from idefics_jax.param_transforms import paths
from idefics_jax.param_tree import abstract_params, param_shapes
from idefics_jax.training.config import TrainConfig
from idefics_jax.training.plan import plan
from idefics_jax.training.run import make_step

RECIPES = {"stage1": stage1, "stage2": stage2, "instruct": instruct, "chat": chat}

# Table 14 of the paper: set, answer tokens, and their percentage in the mixture.
TABLE_14 = {
    "vqav2": (1_595_929, 5.72),
    "cocoqa": (286_982, 1.47),
    "visual7w": (279_268, 1.43),
    "aokvqa": (236_492, 1.21),
    "tallyqa": (738_254, 0.57),
    "okvqa": (38_853, 0.4),
    "hateful_memes": (25_500, 0.13),
    "vqarad": (8418, 0.09),
    "localized_narratives": (21_328_731, 4.56),
    "screen2words": (143_103, 0.37),
    "vsr": (10_062, 0.21),
    "rendered_text": (27_207_774, 5.57),
    "docvqa": (337_829, 3.46),
    "textcaps": (389_658, 2),
    "textvqa": (181_918, 1.86),
    "st_vqa": (127_846, 1.31),
    "ocrvqa": (6_073_824, 0.93),
    "visualmrc": (168_828, 0.86),
    "iam": (144_216, 0.74),
    "infographic_vqa": (61_048, 0.63),
    "diagram_image_to_text": (22_196, 0.11),
    "chart2text": (2_852_827, 4.38),
    "dvqa": (8_346_234, 4.27),
    "vistext": (1_245_485, 1.91),
    "chartqa": (185_835, 1.9),
    "plotqa": (8_478_299, 0.65),
    "figureqa": (3_982_104, 0.61),
    "mapqa": (6_470_485, 0.33),
    "tabmwp": (1_948_166, 2.49),
    "tat_qa": (283_776, 2.18),
    "hitab": (351_299, 1.8),
    "multihiertt": (267_615, 1.37),
    "finqa": (242_561, 0.99),
    "robut_wikisql": (9_680_673, 0.99),
    "robut_sqa": (1_894_824, 0.97),
    "robut_wtq": (6_677_013, 0.51),
    "geomverse": (2_489_459, 3.83),
    "clevr_math": (3_184_656, 3.26),
    "clevr": (2_396_781, 1.23),
    "iconqa": (112_969, 1.16),
    "raven": (105_081, 0.67),
    "intergps": (8404, 0.17),
    "ai2d": (38_832, 0.8),
    "tqa": (26_004, 0.53),
    "scienceqa": (24_872, 0.25),
    "nlvr2": (259_119, 1.33),
    "mimic_cgd": (4_637_229, 0.48),
    "spot_the_diff": (221_477, 0.57),
    "websight": (276_743_299, 0.28),
    "datikz": (59_556_252, 0.03),
    "openhermes": (248_553_747, 12.73),
    "lima": (633_867, 0.81),
    "dolly": (1_329_999, 0.68),
    "metamathqa": (74_328_255, 3.81),
    "math_instruct": (45_393_559, 2.33),
    "orca_math": (63_780_702, 1.63),
    "camel_ai_math": (21_873_629, 0.06),
    "atlas_math_sets": (455_411_624, 3.5),
    "goat": (167_695_693, 0.86),
}
# Columns of the adapted kernels: vision, decoder, head.
MAGNITUDES = 27 * (5 * 1152 + 4304) + 32 * (2 * 4096 + 2 * 1024 + 2 * 14336 + 4096) + 32_003


def built(name):
    return TrainConfig.from_config_dict(RECIPES[name].get_config().to_dict())


def sources(config):
    (stage,) = config.data.stages
    return {source.name: source for source in stage.sources}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_builds_at_full_size(name):
    config = built(name)
    assert config.steps > config.optimizer.warmup_steps
    assert config.data.shape.patches >= config.image_rules["positions_per_side"] ** 2, "a largest image finds a row"


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p"])
def test_a_chip_changes_how_a_recipe_is_computed_and_nothing_that_it_learns(name, chip):
    plain, fitted = (RECIPES[name].get_config(*argument).to_dict() for argument in ((), (chip,)))
    TrainConfig.from_config_dict(fitted)
    differ = {key for key in plain if plain[key] != fitted[key]}
    assert differ <= {"remat", "vision_remat", "rows_a_device", "frozen_dtype"}


@pytest.mark.parametrize("name", RECIPES)
def test_without_a_chip_a_recipe_has_the_least_that_any_of_them_takes(name):
    plain, *fitted = (RECIPES[name].get_config(*argument) for argument in ((), ("v4",), ("v5e",), ("v5p",)))
    assert (plain.remat, plain.vision_remat, plain.rows_a_device) == ("full", "full", 1)
    assert np.dtype(plain.frozen_dtype).itemsize == min(np.dtype(one.frozen_dtype).itemsize for one in fitted)


def test_an_unknown_chip_is_refused_by_name():
    with pytest.raises(UserError, match="argument 'v6e' is none of v4, v5e, v5p"):
        RECIPES["stage2"].get_config("v6e")


def test_the_model_is_the_released_one():
    sizes = Idefics2Config.from_hf({"model_type": "idefics2", **built("chat").model})
    assert sum(math.prod(leaf.shape) for leaf in paths.flatten(param_shapes(sizes)).values()) == 8_402_768_112


@pytest.mark.parametrize(
    ("name", "rows", "trained"),
    [
        # The connector, adapters of rank 64, two (three) rows of two tables, and under DoRA a magnitude a column.
        ("stage1", 2, 743_219_200 + 204_863_616 + 4 * 4096),
        ("stage2", 2, 743_219_200 + 204_863_616 + 4 * 4096),
        ("instruct", 3, 743_219_200 + 204_863_680 + 6 * 4096 + MAGNITUDES),
        ("chat", 3, 743_219_200 + 204_863_680 + 6 * 4096 + MAGNITUDES),
    ],
)
def test_the_plan_tells_what_trains_without_a_weight(name, rows, trained):
    """The paper's Table 3 counts 950 M trained parameters."""
    lines = str(plan(built(name))).splitlines()
    table = {line.split()[0]: line.split()[1:] for line in lines[1:-5]}
    assert lines[-5].endswith(f"{trained:,} of them trainable")
    assert lines[-3].startswith(f"trained parameters, float32: {4 * trained:,} bytes (3.5")
    assert table["text_model/embed_tokens/new_rows"][:3] == [f"{rows}x4096", "float32", "trainable"]
    vocabulary = 32_000 + rows
    held = "float32" if name == "stage1" else "bfloat16"
    assert table["text_model/embed_tokens/embedding"] == [f"{vocabulary}x4096", held, "frozen"]
    assert table["connector/perceiver_resampler/layers/mlp/up_proj/kernel"][2:] == ["trainable", "0.0001", "0"]
    assert table["connector/modality_projection/up_proj/kernel"][2:] == ["trainable", "0.0001", "0.1"]
    dora = name in ("instruct", "chat")
    assert ("text_model/lm_head/lora_magnitude" in table) == dora
    assert sum("lora_A" in path for path in table) == 6 + 7 + 1
    assert not [
        path
        for path, row in table.items()
        if "trainable" in row and path.endswith(("bias", "scale")) and "connector" not in path
    ]


@pytest.mark.parametrize("name", ["stage1", "stage2", "instruct"])
def test_the_step_of_the_whole_model_fits_its_batch(name):
    """Traced, not compiled: 2,048 rows, eight billion parameters, no array."""
    config = built(name)
    laid_out = plan(config)
    step = make_step(config, laid_out.sizes, laid_out.optimizer, sharding.make_mesh({}, jax.devices()[:1]))
    state, metrics = jax.eval_shape(step, laid_out.state, laid_out.frozen, batch_spec(config.data.shape))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), laid_out.state
    )
    assert metrics["loss"].shape == ()


def test_every_parameter_can_be_cut_over_the_mesh():
    """Widths that the mesh does not divide would stop the run on the first day of a pod."""
    config = built("chat")
    sizes = Idefics2Config.from_hf({"model_type": "idefics2", **config.model})
    shapes, axes = (paths.flatten(tree) for tree in abstract_params(sizes))
    for path, leaf in shapes.items():
        for size, axis in zip(leaf.shape, sharding.spec(axes[path], sharding.RULES[config.sharding]), strict=True):
            assert axis is None or size % config.mesh[axis] == 0, path


@pytest.mark.parametrize(
    ("name", "shares"),
    [
        ("stage1", {"obelics": 0.70, "pairs": 0.30}),
        ("stage2", {"obelics": 0.45, "pairs": 0.35, "pdf": 0.20}),
    ],
)
def test_pretraining_mixes_the_paper_s_shares_of_sequences(name, shares):
    sequences = {
        source.name: source.weight / stage1.DOCUMENTS_A_SEQUENCE[source.name]
        for source in sources(built(name)).values()
    }
    assert {kind: share / sum(sequences.values()) for kind, share in sequences.items()} == pytest.approx(shares)


@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_pretraining_leaves_out_what_the_authors_code_does(name):
    mixture = sources(built(name))
    assert mixture["pairs"].filters == Filters(image_min_side=150)
    assert mixture["obelics"].filters == Filters(
        document_max_missing_images=1.0,
        document_min_images=1,
        document_max_consecutive_images=2,
        document_max_trailing_images=1,
        document_min_images_before_text=1,
    )


def test_instruction_tuning_mixes_the_paper_s_shares_of_answer_tokens():
    conversations = {name: size for name, (size, _) in {**instruct.CAULDRON, **instruct.TEXT}.items()}
    mixture = sources(built("instruct"))
    assert set(mixture) == set(TABLE_14)
    assert sum(source.kind == "cauldron" for source in mixture.values()) == 50
    tokens = {name: source.weight * TABLE_14[name][0] / conversations[name] for name, source in mixture.items()}
    for name, (_, percentage) in TABLE_14.items():
        # Its 4.56 % does not follow from its own weight in the authors' code.
        within = 0.2 if name == "localized_narratives" else 0.03
        assert 100 * tokens[name] / sum(tokens.values()) == pytest.approx(percentage, abs=within), name


PRETRAINING, TUNING = ("stage1", "stage2"), ("instruct", "chat")
ADAPTERS = tuple(f"lora.{part}" for part in ("vision", "text", "head"))
# What the paper and the authors' code tell of a recipe's settings, beside the mixtures.
TOLD = (
    (RECIPES, "optimizer.name", "adamw"),
    (RECIPES, "optimizer.b1", 0.9),
    (RECIPES, "optimizer.b2", 0.999),
    (RECIPES, "optimizer.clip_norm", 1.0),
    (("stage1", "stage2", "instruct"), "optimizer.learning_rate", 1e-4),
    (("stage1",), "steps", 80_000),
    (("instruct",), "steps", 6000),
    (("stage1",), "optimizer.warmup_steps", 2000),
    (("instruct",), "optimizer.warmup_steps", 100),
    (PRETRAINING, "optimizer.schedule", "constant"),
    (("instruct",), "optimizer.schedule", "linear"),
    *((RECIPES, f"{adapter}.rank", 64) for adapter in ADAPTERS),
    *((RECIPES, f"{adapter}.alpha", 16.0) for adapter in ADAPTERS),
    *((RECIPES, f"{adapter}.dropout", 0.1) for adapter in ADAPTERS),
    *((RECIPES, f"{adapter}.init", "gaussian") for adapter in ADAPTERS),
    *((PRETRAINING, f"{adapter}.dora", False) for adapter in ADAPTERS),
    *((TUNING, f"{adapter}.dora", True) for adapter in ADAPTERS),
    (("stage1",), "image_rules.longest_edge", 384),
    (("stage2", *TUNING), "image_rules.longest_edge", 980),
    (RECIPES, "image_rules.shortest_edge", 378),
    (("stage1",), "image_rules.positions_per_side", 27),
    (("stage2", *TUNING), "image_rules.positions_per_side", 70),
    (("stage2",), "resize_positions", True),
    (("stage1",), "grow_vocabulary", "normal"),
    (("instruct",), "grow_vocabulary", "mean"),
    (PRETRAINING, "neftune_alpha", 0.0),
    (("instruct",), "neftune_alpha", 5.0),
)


def setting(config, name):
    """The value of a dotted name, through dataclasses and mappings."""
    return functools.reduce(
        lambda held, key: held[key] if isinstance(held, Mapping) else getattr(held, key), name.split("."), config
    )


def test_what_the_paper_and_the_code_tell_stands_in_the_recipes():
    configs = {name: built(name) for name in RECIPES}
    found = {(name, said): setting(configs[name], said) for names, said, _ in TOLD for name in names}
    assert found == {(name, said): value for names, said, value in TOLD for name in names}
    decay = {".*/lora_[AB]": 0.1, "connector/modality_projection/.*": 0.1, "connector/perceiver_resampler/.*": 0.0}
    for config in configs.values():
        rules = {rule.pattern: rule for rule in config.partition}
        assert {pattern: rules[pattern].weight_decay for pattern in decay} == decay
        assert {rule.lr_factor for rule in rules.values() if rule.state == "trainable"} == {1.0}


@pytest.mark.parametrize("name", PRETRAINING)
def test_a_batch_has_the_paper_s_tokens_and_documents_the_length_of_its_sequences(name):
    config = built(name)
    assert config.data.shape.rows * config.data.shape.tokens == 2048 * 2048
    told = {"obelics": 2048, "pairs": 1536, "pdf": 1024}
    for source in sources(config).values():
        assert min(source.document_tokens, config.data.document_tokens) == told[source.name]


def test_images_and_turns_are_augmented_where_the_paper_does():
    for source in sources(built("stage2")).values():
        assert (source.augmentation.upscale, source.augmentation.upscale_to) == (0.7, 3.0), source.name
    for source in sources(built("instruct")).values():
        made, pictured = source.augmentation, source.kind == "cauldron"
        assert (made.split_share, made.upscale, made.shuffle_turns) == (
            (0.5, 0.5, True) if pictured else (None, 0, False)
        )
        assert made.max_turns == 7


def test_each_recipe_begins_where_the_one_before_it_ends():
    names = list(RECIPES)
    assert built("stage1").init_from is None
    for before, name in zip(names, names[1:], strict=False):
        assert built(name).init_from == f"{stage1.WORKDIR}/{before}"
