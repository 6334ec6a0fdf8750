"""The recipes at a size that trains in seconds: another model's size, other paths, fewer steps, and what follows.

A small model has short rows, of which a batch has as many as there are shards; loss chunks are short as the rows, an
eighth of one as in the recipes; and the machine has one device.
"""

from ml_collections import ConfigDict

WIDTH = 16
# The released vocabulary begins with 32,000 pieces, the embedded tokenizer with 400.
PIECES = {"released": 32_000, "embedded": 400}
# Positions a side of the two resolutions.
POSITIONS = {27: 4, 70: 8}
STEPS = 2


def shrink(config: ConfigDict, folder: str) -> ConfigDict:
    """Changes a recipe in place and returns it; `folder` holds data, weights and the processor."""
    side = POSITIONS[config.image_rules.positions_per_side]
    config.model = model(side, config.model.text_config.vocab_size - PIECES["released"] + PIECES["embedded"])
    config.image_rules.update({"longest_edge": 14 * side, "shortest_edge": 28, "positions_per_side": side})
    config.processor = f"{folder}/data/processor"
    for part in config.init_parts:
        config.init_parts[part] = f"{folder}/{part}"
    for stage in config.data.stages.values():
        for source in stage.sources.values():
            source.paths = (f"{folder}/data/shards/{source.kind}",)
    config.frozen_dtype = "float32"  # as on v4 and v5p, to compare to the bit
    config.steps, config.optimizer.warmup_steps = STEPS, 1
    config.data.shape.update({"rows": 2, "tokens": 256, "patches": side**2 * 4, "vision_rows": 2})
    config.data.document_tokens, config.loss_chunk, config.data.virtual_shards = 256, 32, 2
    config.mesh.fsdp = 1
    return config


def model(side: int, vocab_size: int) -> ConfigDict:
    return ConfigDict(
        {
            "vision_config": {
                "hidden_size": WIDTH,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "patch_size": 14,
                "image_size": 14 * side,
            },
            "perceiver_config": {
                "hidden_size": WIDTH,
                "resampler_n_latents": 4,
                "resampler_depth": 1,
                "resampler_n_heads": 2,
                "resampler_head_dim": 8,
                "num_key_value_heads": 1,
                "rms_norm_eps": 1e-5,
            },
            "text_config": {
                "vocab_size": vocab_size,
                "hidden_size": WIDTH,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 256,
                "rms_norm_eps": 1e-5,
                "rope_theta": 10000.0,
                "sliding_window": 4096,
            },
        }
    )
