"""A small Idefics2 that learns to read handwritten digits from scratch, in minutes on two cores.

    python -m data_pipelines.digits work/digits-data
    python -m idefics_jax.train --config configs/digits.py --workdir work/digits
    python -m idefics_jax.train --config configs/digits.py:lora --workdir work/digits-lora

The argument says how the pretrained parts (vision encoder and decoder) are adapted, as the paper's Table 3 does: `full`
(the default), `lora`, `dora`, or `frozen`. The connector is new and trains in full. All but `full` start from the model
that `full` leaves in work/digits/model.

The architecture is the paper's at a small size. Every value without another origin is our choice, found on this data.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from idefics_jax.errors import UserError

DATA = "work/digits-data"
PATCH = 14  # the released model's
LATENTS = 4  # what data_pipelines.digits writes into the processor
WIDTH = 64
ADAPTATIONS = ("full", "lora", "dora", "frozen")


def get_config(adaptation: str = "full") -> ConfigDict:
    if adaptation not in ADAPTATIONS:
        raise UserError(f"configs/digits.py:{adaptation} is none of {', '.join(ADAPTATIONS)}")
    config = ConfigDict()
    config.seed = 0
    config.steps = 1500
    config.processor = f"{DATA}/processor"
    config.image_rules = ConfigDict()
    config.init_from = placeholder(str)
    config.init_parts = ConfigDict()
    config.model = model()
    config.resize_positions = False
    config.grow_vocabulary = "none"
    # A table as large as the features it is added to; latents that differ from the start.
    config.init_std = (
        ("vision_model/embeddings/position_embedding/embedding", 0.5),
        ("connector/perceiver_resampler/latents", 1.0),
    )
    config.dtype = "float32"
    config.frozen_dtype = "float32"
    config.remat = config.vision_remat = "none"
    config.loss_chunk = 64  # of 256 tokens: 2 % slower than all logits at once
    config.rows_a_device = 64
    config.partition = (
        # pattern, state, factor of the learning rate, weight decay
        ("text_model/lm_head/kernel", "trainable", 1.0, 0.0),
        (".*/kernel", "trainable", 1.0, 0.05),
        (".*", "trainable", 1.0, 0.0),
    )
    config.quantize = ()
    config.lora = ConfigDict()
    config.new_rows = 0
    config.neftune_alpha = 0.0
    config.optimizer = optimizer()
    config.max_skipped_steps = 0
    config.diverged_after = 100
    config.data = data()
    config.mesh = {"data": -1}
    config.sharding = "data"
    config.log_every = 25
    config.checkpoint_every = 500
    config.keep_checkpoints = 2
    if adaptation != "full":
        adapt(config, adaptation)
    return config


def model() -> ConfigDict:
    """The sections of a Hugging Face config.json."""
    std = WIDTH**-0.5
    return ConfigDict(
        {
            "vision_config": {
                "hidden_size": WIDTH,
                "intermediate_size": 2 * WIDTH,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 8 * PATCH,
                "patch_size": PATCH,
                "initializer_range": std,
            },
            "perceiver_config": {
                "hidden_size": WIDTH,
                "resampler_n_latents": LATENTS,
                "resampler_depth": 2,
                "resampler_n_heads": 4,
                "resampler_head_dim": 16,
                "num_key_value_heads": 2,
            },
            "text_config": {
                "vocab_size": 512,  # the tokenizer's 400 and a few, rounded up
                "hidden_size": WIDTH,
                "intermediate_size": 2 * WIDTH,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 256,
                "initializer_range": std,
                "sliding_window": placeholder(int),
            },
        }
    )


def optimizer() -> ConfigDict:
    return ConfigDict(
        {
            "name": "muon",
            "learning_rate": 2e-3,
            "muon_learning_rate": 0.02,
            "schedule": "cosine",
            "warmup_steps": 50,
            "b1": 0.9,
            "b2": 0.95,
            "clip_norm": 1.0,  # the authors' code
        }
    )


def data() -> ConfigDict:
    def source(name: str, kind: str, weight: float = 1.0, image_root: str | None = None) -> dict:
        return {"kind": kind, "paths": (f"{DATA}/{name}.parquet",), "weight": weight, "image_root": image_root}

    return ConfigDict(
        {
            "seed": 0,
            "after": placeholder(str),
            "stages": {
                # Digits alone, cropped, for the first 4 % of the steps: without it, digits are found much later.
                "stage1": {"sources": {"warmup": source("warmup", "pairs")}, "documents": 5000},
                "stage2": {
                    "sources": {
                        "pairs": source("pairs", "pairs"),
                        "interleaved": source("interleaved", "obelics", image_root=DATA),
                        "conversations": source("conversations", "cauldron", weight=2.0),
                        # Rows of digits are the hardest to read.
                        "numbers": source("numbers", "cauldron", weight=3.0),
                    },
                    "documents": placeholder(int),
                },
            },
            "shape": {
                "rows": 4,
                "tokens": 256,
                "vision_rows": 1,
                # By the mix's patches and images a token: 0.99 of the tokens and 0.96 of the patches are then useful.
                "patches": 168,
                "images": 24,
                "patch_dim": 3 * PATCH**2,
            },
            "document_tokens": 256,
            "virtual_shards": 4,
            "lookahead": 48,  # in each shard
            "lookahead_mib": 64,
            "rounds": 4,
            "max_bad_fraction": 0.01,
            "num_threads": 0,  # two cores: the arithmetic has its own threads
            "prefetch": 4,
            "row_groups_mib": 64,
            "cache_mib": 256,
        }
    )


def adapt(config: ConfigDict, adaptation: str) -> None:
    """Freezes the pretrained parts, and gives them adapters if asked to."""
    config.init_from = "work/digits/model"
    config.model = ConfigDict()
    config.init_std = ()
    connector = (
        ("connector/.*/kernel", "trainable", 1.0, 0.05),
        ("connector/.*", "trainable", 1.0, 0.0),
    )
    config.optimizer.name = "adamw"
    if adaptation == "frozen":
        config.partition = (*connector, (".*", "frozen"))
        return
    config.partition = ((".*/lora_.*", "trainable", 1.0, 0.0), *connector, (".*", "frozen"))
    # Rank 64 in the paper's runs at widths of 1152 and 4096; alpha below it, as in the authors' code.
    adapter = {"rank": 8, "alpha": 4.0, "dropout": 0.0, "dora": adaptation == "dora", "init": "gaussian"}
    config.lora.vision = {"pattern": "vision_model/encoder/.*", **adapter}
    config.lora.text = {"pattern": "text_model/layers/.*", **adapter}
