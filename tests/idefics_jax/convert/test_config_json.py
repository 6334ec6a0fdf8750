"""config.json from Hugging Face to our config and back."""

import copy
import json

import pytest
import transformers

from idefics_jax.config import ConfigError, Idefics2Config
from tests.idefics_jax import reference
from tests.idefics_jax.convert.released import RELEASED_CONFIG


def saved(tmp_path):
    """As transformers 5.23 saves it."""
    config = transformers.Idefics2Config(
        vision_config=reference.VISION, perceiver_config=reference.PERCEIVER, text_config=reference.TEXT,
        image_token_id=reference.IMAGE,
    )  # fmt: skip
    config.architectures = ["Idefics2ForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    return json.loads((tmp_path / "config.json").read_text())


def sources(tmp_path):
    return {"released": RELEASED_CONFIG, "saved": saved(tmp_path)}


def assert_contains(output, given, where="config.json"):
    for name, value in given.items():
        assert name in output, f"{where}.{name} is lost"
        if isinstance(value, dict):
            assert_contains(output[name], value, f"{where}.{name}")
        else:
            assert (output[name], type(output[name])) == (value, type(value)), f"{where}.{name}"


@pytest.mark.parametrize("source", ["released", "saved"])
def test_every_field_is_kept(tmp_path, source):
    given = sources(tmp_path)[source]
    before = copy.deepcopy(given)
    config = Idefics2Config.from_hf(given)
    assert given == before
    assert_contains(config.to_hf(), given)
    assert Idefics2Config.from_hf(config.to_hf()) == config
    assert Idefics2Config.from_hf(config.to_hf()).to_hf() == config.to_hf()


@pytest.mark.parametrize("source", ["released", "saved"])
@pytest.mark.parametrize("section", ["vision_config", "perceiver_config", "text_config", None])
def test_unknown_fields_are_kept(tmp_path, source, section):
    given = copy.deepcopy(sources(tmp_path)[source])
    (given if section is None else given[section])["new_in_6_0"] = {"a": [1, None]}
    given["audio_config"] = {"hidden_size": 3}
    assert_contains(Idefics2Config.from_hf(given).to_hf(), given)


@pytest.mark.parametrize("source", ["released", "saved"])
def test_transformers_reads_our_file_as_it_reads_its_own(tmp_path, source):
    given = sources(tmp_path)[source]
    ours = transformers.Idefics2Config(**Idefics2Config.from_hf(given).to_hf()).to_dict()
    theirs = transformers.Idefics2Config(**copy.deepcopy(given)).to_dict()
    for config in (ours, theirs):
        del config["vision_config"]["model_type"], config["perceiver_config"]["model_type"]
    assert_contains(ours, theirs)


NARROW = {"model_type": "mistral", "hidden_size": 512, "num_attention_heads": 8, "vocab_size": 32003}
SPARSE = {
    "narrow": {"model_type": "idefics2", "text_config": NARROW},
    "bare": {"model_type": "idefics2", "image_token_id": 31999},
}


@pytest.mark.parametrize("source", ["released", "saved", *SPARSE])
def test_fields_left_out_mean_what_they_mean_in_transformers(tmp_path, source):
    given = {**sources(tmp_path), **SPARSE}[source]
    ours, theirs = Idefics2Config.from_hf(given), transformers.Idefics2Config(**copy.deepcopy(given))
    for section in ("vision_config", "perceiver_config", "text_config"):
        part, reference_part = getattr(ours, section), getattr(theirs, section)
        for name, value in vars(part).items():
            if name == "rope_theta":
                assert value == reference_part.rope_parameters["rope_theta"]
            elif name != "extra":
                assert value == getattr(reference_part, name), f"{section}.{name}"


@pytest.mark.parametrize(
    ("name", "value", "written"),
    [
        ("rope_theta", 5e5, 5e5),
        ("hidden_act", "swish", "swish"),
        ("initializer_range", 0.0, 0.0),
        ("pad_token_id", 3, 3),
    ],
)
def test_what_transformers_takes_is_taken_and_comes_back(name, value, written):
    given = copy.deepcopy(RELEASED_CONFIG)
    given["text_config"][name] = value
    output = Idefics2Config.from_hf(given).to_hf()
    assert output["text_config"][name] == written
    theirs = transformers.Idefics2Config(**copy.deepcopy(given)).text_config
    read = transformers.Idefics2Config(**output).text_config
    assert read.rope_parameters == theirs.rope_parameters
    assert getattr(read, name, None) == getattr(theirs, name, None)


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"model_type": "idefics2", "text_config": {"hidden_size": 1%s}}' % ("0" * 400)]
)
def test_a_file_that_is_hostile_is_a_sentence(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="is not JSON|hidden_size is 1000"):
        Idefics2Config.load(tmp_path)


REFUSED = [
    ("model_type", "llava", "model_type 'llava'"),
    ("text_config.model_type", "llama", "text_config.model_type is 'llama'"),
    ("text_config.hidden_act", "tanh", "text_config.hidden_act is 'tanh'"),
    ("text_config.attention_dropout", 0.1, "text_config.attention_dropout is 0.1"),
    ("text_config.rope_scaling", {"type": "linear", "factor": 2.0}, "text_config.rope_scaling asks for 'linear'"),
    ("text_config.rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}, "rope_parameters asks for 'yarn'"),
    ("text_config.vocab_size", 32000, "image_token_id is 32001, outside"),
    ("text_config.num_key_value_heads", 5, "num_key_value_heads"),
    ("text_config.num_hidden_layers", 0, "text_config.num_hidden_layers is 0"),
    ("text_config.rms_norm_eps", float("nan"), "text_config.rms_norm_eps is nan"),
    ("text_config.rope_parameters", "x", "text_config.rope_parameters is 'x'"),
    ("text_config.rope_parameters", {"rope_theta": 1e4, "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ("text_config.rope_parameters", {"full_attention": {"rope_theta": 1e4}}, "full_attention is"),
    ("vision_config.image_size", 10, "vision_config.image_size is 10, less than patch_size"),
    ("quantization_config", {"load_in_4bit": True}, "quantization_config; only weights in float types"),
    ("vision_config.num_channels", 4, "vision_config.num_channels is 4"),
    ("vision_config.patch_size", "14", "vision_config.patch_size is '14'"),
    ("vision_config", 7, "vision_config is 7"),
    ("perceiver_config.resampler_n_latents", True, "perceiver_config.resampler_n_latents is True"),
    ("tie_word_embeddings", "no", "tie_word_embeddings is 'no'"),
]


@pytest.mark.parametrize(("path", "value", "words"), REFUSED, ids=[path for path, _, _ in REFUSED])
def test_value_that_is_not_supported_is_named(path, value, words):
    given = copy.deepcopy(RELEASED_CONFIG)
    *sections, name = path.split(".")
    (given[sections[0]] if sections else given)[name] = value
    with pytest.raises(ConfigError) as error:
        Idefics2Config.from_hf(given)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
