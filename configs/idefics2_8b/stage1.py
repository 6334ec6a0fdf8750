"""Idefics2-8B, first pretraining stage: images of at most 384 pixels, web pages and image-text pairs.

    python -m idefics_jax.train --config configs/idefics2_8b/stage1.py --plan
    python -m idefics_jax.train --config configs/idefics2_8b/stage1.py --workdir work/idefics2_8b/stage1

With the name of a chip, `stage1.py:v5p`, a recipe takes what that chip has room for: the same steps in less time.

The four stages one after another: `python -m launch.recipes`. Each begins with what this file returns and changes what
differs.

Where a value comes from stands behind it: "paper" is arXiv 2405.02246; "code" is the authors' published training code,
in its later SmolVLM state, so its values are their habit and not proof of what Idefics2 used; "ours" is our choice, as
neither says.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from idefics_jax.errors import UserError

WORKDIR = "work/idefics2_8b"
DATA = "data"
WEIGHTS = "weights"

# Share of each kind among the packed sequences (paper), and how many documents fill a sequence (ours), as a source's
# weight is a share of documents. OBELICS has 115 B tokens and 353 M images on 141 M pages: 816 tokens and 2.5 images of
# 66 each, so 2.1 pages in 2,048. A pair is some 20 tokens and an image, so 17 in the paper's 1,536. Together they give
# 8.8 images and 1,300 tokens of text a sequence in this stage, where the paper tells 8.3 and 1,220.
SHARES = {"obelics": 0.70, "pairs": 0.30}
DOCUMENTS_A_SEQUENCE = {"obelics": 2.1, "pairs": 17.0, "pdf": 1.0}
SEQUENCE = {"obelics": 2048, "pairs": 1536, "pdf": 1024}  # tokens (paper): a longer document is cut
IMAGE_SIDE = 27  # patches: what 378 to 384 pixels hold
# What each chip has memory for, of 64 v4 and v5p and 256 v5e (launch.aot --search): the policy that recomputes least,
# and the most rows at once.
ROOM = {
    "v4": {"remat": "linear", "vision_remat": "linear", "rows_a_device": 1},
    "v5e": {"remat": "attention", "vision_remat": "attention", "rows_a_device": 1},
    "v5p": {"remat": "linear", "vision_remat": "linear", "rows_a_device": 4},
}
RESIZER = "simd"  # ours: a quarter of the time, at most one level of 255 beside the reference in 3 values of 100


def get_config(chip: str = "") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # ours
    config.steps = 80_000  # code: the checkpoint that stage 2 began from
    # Any Idefics2 folder; its tokenizer is Mistral's and three control tokens.
    config.processor = f"{WEIGHTS}/idefics2-8b-base"
    # 384 at most (paper), 378 at least (code): every image becomes 27 x 27 patches, as SigLIP was trained.
    config.image_rules = {
        "longest_edge": 384,
        "shortest_edge": 378,
        "positions_per_side": IMAGE_SIDE,
        "split": False,  # paper: images are split in the instruction tuning alone
        "resizer": RESIZER,
    }
    config.init_from = placeholder(str)
    config.init_parts = {  # paper
        "vision_model": f"{WEIGHTS}/siglip-so400m-patch14-384",
        "text_model": f"{WEIGHTS}/Mistral-7B-v0.1",
    }
    config.model = model(positions_a_side=IMAGE_SIDE, vocab_size=32_002)
    config.resize_positions = False
    # Rows of <fake_token_around_image> and <image> start with a standard deviation of 1/64, and so do the latents; what
    # else is new with sqrt(0.4 / width), as its layers say (code).
    config.grow_vocabulary = "normal"
    config.init_std = ()
    config.dtype = "bfloat16"  # code
    # Ours: adapters are merged into the base between stages, and bfloat16 would round most of what they add away.
    config.frozen_dtype = "float32"
    config.remat = config.vision_remat = "full"  # code: gradient checkpointing
    config.loss_chunk = 512  # ours
    config.rows_a_device = 1  # ours: what every slice has room for; the batch is `data.shape.rows`
    config.partition = partition()
    config.quantize = ()
    config.lora = lora(dora=False)
    config.new_rows = 2  # code: the rows of the two new tokens train, the old ones stay
    config.neftune_alpha = 0.0  # paper: noise in the instruction tuning alone
    config.optimizer = optimizer()
    config.max_skipped_steps = 10  # ours
    config.diverged_after = 100  # ours
    config.data = data()
    config.mesh = {"data": -1, "fsdp": 64}  # ours: 64 divides both widths, 1,152 and 4,096
    config.sharding = "fsdp"  # ours, and all of what follows
    config.log_every = 10
    config.checkpoint_every = 500
    config.keep_checkpoints = 3
    return fit(config, chip, ROOM)


def fit(config: ConfigDict, chip: str, room: dict[str, dict]) -> ConfigDict:
    """Gives a recipe what a chip has room for; without the name of one, what it has says least of memory."""
    if chip and chip not in room:
        raise UserError(f"the recipe's argument {chip!r} is none of {', '.join(room)}, the chips it is known to fit")
    config.update(room.get(chip, {}))
    return config


def model(*, positions_a_side: int, vocab_size: int) -> ConfigDict:
    """The sections of a Hugging Face config.json: the released model's, at a stage's positions and vocabulary."""
    return ConfigDict(
        {
            "vision_config": {  # SigLIP-SO400M/14
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 27,
                "num_attention_heads": 16,
                "patch_size": 14,
                "image_size": 14 * positions_a_side,
            },
            "perceiver_config": {
                "hidden_size": 4096,
                "resampler_n_latents": 64,
                "resampler_depth": 3,
                "resampler_n_heads": 16,
                "resampler_head_dim": 96,
                "num_key_value_heads": 4,
                "rms_norm_eps": 1e-5,  # code; transformers computes the released weights with its default of 1e-6
            },
            "text_config": {  # Mistral-7B-v0.1
                "vocab_size": vocab_size,
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "max_position_embeddings": 32768,
                "rms_norm_eps": 1e-5,
                "rope_theta": 10000.0,
                "sliding_window": 4096,
                "pad_token_id": 0,  # transformers' default for Idefics2: the embedding of <unk> gets no gradient
            },
        }
    )


def lora(*, dora: bool) -> ConfigDict:
    """Adapters of the pretrained parts: 205 M parameters, the 200 M that the authors tell of their next paper."""
    # Rank, alpha, dropout, start and targets: code. The paper tells only that LoRA (later DoRA) adapts both backbones.
    adapter = {"rank": 64, "alpha": 16.0, "dropout": 0.1, "dora": dora, "init": "gaussian"}
    return ConfigDict(
        {
            "vision": {
                "pattern": "vision_model/encoder/layers/(self_attn/(q|k|v|out)_proj|mlp/fc[12])",
                **adapter,
            },
            "text": {"pattern": "text_model/layers/.*_proj", **adapter},
            "head": {"pattern": "text_model/lm_head", **adapter},
        }
    )


def partition() -> tuple[tuple, ...]:
    """What trains: new weights in full, pretrained ones through their adapters (paper)."""
    # The code decays everything by 0.1 but biases, norms, gates and the whole resampler. Biases and norms of the
    # pretrained parts do not train here: the SmolVLM runs unfroze them, the paper speaks of LoRA and new weights alone.
    return (
        # pattern, state, factor of the learning rate, weight decay
        (".*/lora_[AB]", "trainable", 1.0, 0.1),
        (".*/new_rows", "trainable", 1.0, 0.1),
        ("connector/modality_projection/.*", "trainable", 1.0, 0.1),
        ("connector/perceiver_resampler/.*", "trainable", 1.0, 0.0),
        (".*", "frozen"),
    )


def optimizer() -> ConfigDict:
    return ConfigDict(
        {
            "name": "adamw",  # paper
            "learning_rate": 1e-4,  # paper: of both pretraining stages
            "muon_learning_rate": 1e-4,  # not read
            "schedule": "constant",  # code: linear to 0 over 500,000 steps, of which a sixth was run
            "warmup_steps": 2000,  # code
            "b1": 0.9,  # code
            "b2": 0.999,  # code
            "clip_norm": 1.0,  # code
        }
    )


def data() -> ConfigDict:
    return ConfigDict(
        {
            "seed": 0,  # ours
            "after": placeholder(str),
            "stages": {"stage1": {"sources": sources(SHARES, augmentation={}), "documents": None}},
            "shape": {
                # Ours: two of the paper's 2,048 sequences of 2,048 tokens a row, where documents pack more tightly. By
                # benchmarks.packing 19 images and vision rows leave the least of either empty.
                "rows": 1024,
                "tokens": 4096,
                "vision_rows": 19,
                "patches": IMAGE_SIDE**2,
                "images": 19,
                "patch_dim": 3 * 14**2,
            },
            "document_tokens": 2048,  # paper: web pages
            # Ours, all of what follows.
            "virtual_shards": 64,  # as many as the largest slices have hosts
            "lookahead": 256,
            "lookahead_mib": 256,
            "rounds": 40,
            "max_bad_fraction": 0.05,
            "num_threads": 16,
            "prefetch": 1,  # a process's rows of a batch are hundreds of MiB: one in use and one being made
            "row_groups_mib": 512,  # of parquet; what is prepared needs none
            "cache_mib": 0,
        }
    )


def sources(shares: dict[str, float], *, augmentation: dict) -> dict[str, dict]:
    """Sources of pretraining, with the weights that give them their shares of the packed sequences.

    Paths lead to what data_pipelines.prepare writes; published parquet can be named as well, with its `image_root`.
    """
    # How PMD and LAION-COCO (its synthetic captions), and the three sets of scanned text, shared their kinds is not
    # told: here by their sizes. The caption is the column of that name: for LAION-COCO the synthetic one (paper), which
    # is what to give img2dataset as its caption_col; PMD has its own.
    files = {
        "obelics": ("obelics",),
        "pairs": ("laion_coco", "pmd"),
        "pdf": ("ocr_idl", "pdfa", "rendered_text"),
    }
    return {
        name: {
            "kind": name,
            "paths": tuple(f"{DATA}/{path}" for path in files[name]),
            "weight": share * DOCUMENTS_A_SEQUENCE[name],
            "image_root": None,  # prepared shards hold their images
            "augmentation": augmentation,
            "filters": filters(name),
            "document_tokens": SEQUENCE[name],
        }
        for name, share in shares.items()
    }


def filters(kind: str) -> dict[str, float]:
    """What is left out of a kind of documents, beyond what OBELICS' own filters took before it was published."""
    if kind == "pairs":
        return {"image_min_side": 150}  # code
    if kind != "obelics":
        return {}
    return {
        "document_max_missing_images": 1.0,  # OBELICS' code: images that could not be fetched leave their page
        "document_min_images": 1,  # code
        "document_max_consecutive_images": 2,  # code
        "document_max_trailing_images": 1,  # code
        "document_min_images_before_text": 1,  # code: a page whose only image comes last is skipped
        # Paper: the 5 % of pages with the highest perplexity by Falcon-1B go. The published pages have no column
        # `perplexity`: add it, and give here what data_pipelines.quantile prints. Without it nothing is dropped.
        "document_max_perplexity": placeholder(float),
    }
