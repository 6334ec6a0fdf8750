"""A sentencepiece BPE model as Hugging Face's tokenizer.json, and back.

The two hold the same thing in different words: sentencepiece ranks pieces by score, tokenizer.json ranks merges by
place. transformers 5 saves only tokenizer.json; and left to convert a tokenizer.model itself it ranks the merges of
runs of spaces first (the released tokenizer.json and sentencepiece: last), so a folder is written with both.
"""

from collections.abc import Mapping
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from idefics_jax.errors import UserError
from idefics_jax.tokenizer import CONTROL_TOKENS, WORD_BOUNDARY, Tokenizer


def to_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the content of a tokenizer.json that gives this tokenizer's ids in transformers."""
    spec = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.model)
    vocab = {piece.piece: index for index, piece in enumerate(spec.pieces)}
    bos = tokenizer.piece(tokenizer.bos_id)
    opening = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    second = [{"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, **added_token(name)} for index, name in special_tokens(tokenizer).items()],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": WORD_BOUNDARY,
            "prepend_scheme": "first",
            "split": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": opening,
            "pair": opening + second,
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": WORD_BOUNDARY}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": _merges(spec),
        },
    }


def special_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """Returns the special tokens by id: unk, bos, eos and the control tokens."""
    own = {index: tokenizer.piece(index) for index in (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id)}
    return own | dict(enumerate(CONTROL_TOKENS, start=tokenizer.fake_token_id))


def added_token(name: str) -> dict[str, Any]:
    """Returns an added token's entry, with the released flags."""
    return {
        "content": name,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def from_json(content: Mapping[str, Any]) -> Tokenizer:
    """Rebuilds the sentencepiece model a tokenizer.json was converted from.

    Raises:
      UserError: the file does not describe a Llama-style byte-fallback BPE.
    """
    model = content.get("model") or {}
    if model.get("type") != "BPE" or not model.get("byte_fallback") or model.get("ignore_merges"):
        raise UserError("tokenizer.json does not hold a byte-fallback BPE model; give Idefics2's own tokenizer")
    names = sorted(model["vocab"], key=model["vocab"].get)
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    special = {token["content"] for token in content.get("added_tokens", [])}
    return Tokenizer(_rebuild(names, merges, special))


def same_ids(content: Mapping[str, Any], tokenizer: Tokenizer) -> bool:
    """Says whether a tokenizer.json ranks the same pieces and merges as the sentencepiece model."""
    own, other = to_json(tokenizer)["model"], content.get("model") or {}
    merges = [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in other.get("merges", [])]
    return other.get("vocab") == own["vocab"] and merges == own["merges"]


def _merges(spec: sentencepiece_model_pb2.ModelProto) -> list[list[str]]:
    """Every way to join two pieces into a third, best score first; among equals the longest left piece."""
    normal = {piece.piece for piece in spec.pieces if piece.type == piece.NORMAL}
    ranked = []
    for piece in spec.pieces:
        if piece.type != piece.NORMAL:
            continue
        for cut in range(1, len(piece.piece)):
            left, right = piece.piece[:cut], piece.piece[cut:]
            if left in normal and right in normal:
                ranked.append((-piece.score, -len(left), -len(right), left, right))
    return [[left, right] for _, _, _, left, right in sorted(ranked, key=lambda merge: merge[:3])]


def _rebuild(names: list[str], merges: list[list[str]], special: set[str]) -> bytes:
    """Writes a sentencepiece model whose scores rank pieces as the merges that form them."""
    ranks: dict[str, int] = {}
    for left, right in merges:
        ranks.setdefault(left + right, len(ranks))
    spec = sentencepiece_model_pb2.ModelProto()
    trainer = spec.trainer_spec
    trainer.model_type = trainer.BPE
    trainer.vocab_size = len(names)
    trainer.byte_fallback = True
    trainer.pad_id = -1
    spec.normalizer_spec.name = "identity"
    spec.normalizer_spec.remove_extra_whitespaces = False
    ids = {"<unk>": "unk_id", "<s>": "bos_id", "</s>": "eos_id"}
    for index, name in enumerate(names):
        piece = spec.pieces.add(piece=name, score=-float(ranks.get(name, len(ranks))))
        if name in ids:
            setattr(trainer, ids[name], index)
            piece.type = piece.UNKNOWN if name == "<unk>" else piece.CONTROL
        elif len(name) == 6 and name.startswith("<0x"):
            piece.type = piece.BYTE
        elif name in special:
            piece.type = piece.CONTROL
    return spec.SerializeToString()
