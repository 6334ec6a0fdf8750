"""The parameter tree of the released 8B model, written out: it is what conversion and checkpoints rely on."""

import functools
import math

import jax
import pytest

from idefics_jax.batch import BatchShape, batch_spec
from idefics_jax.config import Idefics2Config, PerceiverConfig, TextConfig, VisionConfig
from idefics_jax.models.idefics2 import Idefics2
from idefics_jax.param_transforms.paths import flatten
from idefics_jax.sharding import RULES, logical_axes, spec, unbox

RELEASED = Idefics2Config(
    vision_config=VisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=980,
        patch_size=14,
    ),
    perceiver_config=PerceiverConfig(),
    text_config=TextConfig(vocab_size=32003),
)

# Path, shape, logical axes.
TREE = """
connector/modality_projection/down_proj/kernel                       14336 x 4096       mlp embed
connector/modality_projection/gate_proj/kernel                       1152 x 14336       vision_embed mlp
connector/modality_projection/up_proj/kernel                         1152 x 14336       vision_embed mlp
connector/perceiver_resampler/latents                                64 x 4096          latents embed
connector/perceiver_resampler/layers/input_context_norm/scale        3 x 4096           layers embed
connector/perceiver_resampler/layers/input_latents_norm/scale        3 x 4096           layers embed
connector/perceiver_resampler/layers/mlp/down_proj/kernel            3 x 16384 x 4096   layers mlp embed
connector/perceiver_resampler/layers/mlp/gate_proj/kernel            3 x 4096 x 16384   layers embed mlp
connector/perceiver_resampler/layers/mlp/up_proj/kernel              3 x 4096 x 16384   layers embed mlp
connector/perceiver_resampler/layers/post_attention_layernorm/scale  3 x 4096           layers embed
connector/perceiver_resampler/layers/self_attn/k_proj/kernel         3 x 4096 x 384     layers embed kv_heads
connector/perceiver_resampler/layers/self_attn/o_proj/kernel         3 x 1536 x 4096    layers heads embed
connector/perceiver_resampler/layers/self_attn/q_proj/kernel         3 x 4096 x 1536    layers embed heads
connector/perceiver_resampler/layers/self_attn/v_proj/kernel         3 x 4096 x 384     layers embed kv_heads
connector/perceiver_resampler/norm/scale                             4096               embed
text_model/embed_tokens/embedding                                    32003 x 4096       vocab embed
text_model/layers/input_layernorm/scale                              32 x 4096          layers embed
text_model/layers/mlp/down_proj/kernel                               32 x 14336 x 4096  layers mlp embed
text_model/layers/mlp/gate_proj/kernel                               32 x 4096 x 14336  layers embed mlp
text_model/layers/mlp/up_proj/kernel                                 32 x 4096 x 14336  layers embed mlp
text_model/layers/post_attention_layernorm/scale                     32 x 4096          layers embed
text_model/layers/self_attn/k_proj/kernel                            32 x 4096 x 1024   layers embed kv_heads
text_model/layers/self_attn/o_proj/kernel                            32 x 4096 x 4096   layers heads embed
text_model/layers/self_attn/q_proj/kernel                            32 x 4096 x 4096   layers embed heads
text_model/layers/self_attn/v_proj/kernel                            32 x 4096 x 1024   layers embed kv_heads
text_model/lm_head/kernel                                            4096 x 32003       embed vocab
text_model/norm/scale                                                4096               embed
vision_model/embeddings/patch_embedding/bias                         1152               vision_embed
vision_model/embeddings/patch_embedding/kernel                       588 x 1152         patch vision_embed
vision_model/embeddings/position_embedding/embedding                 4900 x 1152        position vision_embed
vision_model/encoder/layers/layer_norm1/bias                         27 x 1152          layers vision_embed
vision_model/encoder/layers/layer_norm1/scale                        27 x 1152          layers vision_embed
vision_model/encoder/layers/layer_norm2/bias                         27 x 1152          layers vision_embed
vision_model/encoder/layers/layer_norm2/scale                        27 x 1152          layers vision_embed
vision_model/encoder/layers/mlp/fc1/bias                             27 x 4304          layers vision_mlp
vision_model/encoder/layers/mlp/fc1/kernel                           27 x 1152 x 4304   layers vision_embed vision_mlp
vision_model/encoder/layers/mlp/fc2/bias                             27 x 1152          layers vision_embed
vision_model/encoder/layers/mlp/fc2/kernel                           27 x 4304 x 1152   layers vision_mlp vision_embed
vision_model/encoder/layers/self_attn/k_proj/bias                    27 x 1152          layers vision_heads
vision_model/encoder/layers/self_attn/k_proj/kernel                  27 x 1152 x 1152   layers vision_embed vision_heads
vision_model/encoder/layers/self_attn/out_proj/bias                  27 x 1152          layers vision_embed
vision_model/encoder/layers/self_attn/out_proj/kernel                27 x 1152 x 1152   layers vision_heads vision_embed
vision_model/encoder/layers/self_attn/q_proj/bias                    27 x 1152          layers vision_heads
vision_model/encoder/layers/self_attn/q_proj/kernel                  27 x 1152 x 1152   layers vision_embed vision_heads
vision_model/encoder/layers/self_attn/v_proj/bias                    27 x 1152          layers vision_heads
vision_model/encoder/layers/self_attn/v_proj/kernel                  27 x 1152 x 1152   layers vision_embed vision_heads
vision_model/post_layernorm/bias                                     1152               vision_embed
vision_model/post_layernorm/scale                                    1152               vision_embed
"""


@pytest.fixture(scope="module")
def boxed():
    batch = batch_spec(BatchShape(rows=1, tokens=8, vision_rows=1, patches=8, images=1))
    init = functools.partial(Idefics2(RELEASED).init, method="full_logits")
    return jax.eval_shape(init, jax.random.key(0), batch)["params"]


def test_the_tree_is_as_written(boxed):
    shapes, axes = flatten(unbox(boxed)), flatten(logical_axes(boxed))
    found = [f"{path} {' x '.join(map(str, shapes[path].shape))} {' '.join(axes[path])}" for path in sorted(shapes)]
    assert found == [" ".join(line.split()) for line in TREE.strip().splitlines()]


def test_the_released_model_has_8402768112_parameters(boxed):
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(unbox(boxed))) == 8_402_768_112


@pytest.mark.parametrize("preset", RULES)
@pytest.mark.parametrize("devices", [{"data": 2, "fsdp": 16, "tensor": 4}, {"data": 1, "fsdp": 128, "tensor": 8}])
def test_every_preset_cuts_the_released_model_evenly(boxed, preset, devices):
    shapes, axes = flatten(unbox(boxed)), flatten(logical_axes(boxed))
    for path, names in axes.items():
        for size, axis in zip(shapes[path].shape, spec(names, RULES[preset]), strict=True):
            assert axis is None or size % devices[axis] == 0, (path, size, axis)
