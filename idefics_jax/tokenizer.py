"""The tokenizer: sentencepiece for text, three control tokens beside it.

The ids are those of transformers' LlamaTokenizer with `legacy=False`, which Idefics2 was released with: a word
boundary is put before the text that opens a sequence (unless it brings its own space), and before no other. The
control tokens follow the sentencepiece vocabulary (32000, 32001, 32002 on Mistral's). They exist only as ids: text
that spells one is encoded as text.
"""

import io
import re
import sys
from collections.abc import Iterable

import sentencepiece
from etils import epath
from sentencepiece import sentencepiece_model_pb2

from idefics_jax.errors import UserError

FAKE_TOKEN = "<fake_token_around_image>"
IMAGE_TOKEN = "<image>"
END_OF_UTTERANCE = "<end_of_utterance>"
CONTROL_TOKENS = (FAKE_TOKEN, IMAGE_TOKEN, END_OF_UTTERANCE)

WORD_BOUNDARY = "\u2581"  # how sentencepiece writes a space
_SURROGATES = re.compile("[\ud800-\udfff]")


class Tokenizer:
    """A sentencepiece BPE model and the ids of the control tokens.

    Attributes:
      model: the sentencepiece file, byte for byte.
      vocab_size: ids in use, the control tokens among them.
      longest_piece: the most characters of text that one id stands for; without byte fallback, where the unknown id
        stands for any number, sys.maxsize.
      unk_id, bos_id, eos_id: as the sentencepiece model has them.
      pad_id: the unknown id, as released; padding is marked by segment 0, never by this id.
      fake_token_id, image_token_id, end_of_utterance_id: the control tokens.
    """

    def __init__(self, model: bytes):
        spec = _parse(model)
        # `encode_spans` puts the word boundary; sentencepiece would put one before every stretch of text.
        spec.normalizer_spec.add_dummy_prefix = False
        spec.normalizer_spec.remove_extra_whitespaces = False
        self._text = sentencepiece.SentencePieceProcessor(model_proto=spec.SerializeToString())
        self.model = model
        self.unk_id, self.bos_id, self.eos_id = self._text.unk_id(), self._text.bos_id(), self._text.eos_id()
        self.pad_id = self.unk_id
        first = len(spec.pieces)
        self.fake_token_id, self.image_token_id, self.end_of_utterance_id = range(first, first + len(CONTROL_TOKENS))
        self.vocab_size = first + len(CONTROL_TOKENS)
        longest = max(len(piece.piece) for piece in spec.pieces)
        self.longest_piece = longest if spec.trainer_spec.byte_fallback else sys.maxsize

    @classmethod
    def load(cls, path: epath.PathLike) -> "Tokenizer":
        """Reads a sentencepiece model file; raises UserError naming it."""
        path = epath.Path(path)
        if not path.exists():
            raise UserError(f"{path} does not exist; give the path of a sentencepiece model")
        try:
            return cls(path.read_bytes())
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def encode(self, text: str, *, at_start: bool) -> list[int]:
        """Returns the ids of a stretch of text; see `encode_spans`, which takes twice as long."""
        return self._text.encode(_bounded(text, at_start)[0])

    def encode_spans(self, text: str, *, at_start: bool) -> tuple[list[int], list[int]]:
        """Encodes a stretch of text between control tokens.

        Args:
          text: any string; nothing in it becomes a control token, and surrogates become U+FFFD.
          at_start: whether the text opens the sequence, and so gets a word boundary before it.

        Returns:
          The ids, and for each id the index of the character of `text` that it begins at.
        """
        bounded, boundary = _bounded(text, at_start)
        encoded = self._text.encode(bounded, return_type="offset_mapping")
        return encoded["ids"], [max(begin - boundary, 0) for begin, _ in encoded["offsets"]]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids, without special tokens and without the word boundary that opens it."""
        return self._text.decode([int(token) for token in ids if self._is_text(int(token))]).removeprefix(" ")

    def piece(self, token: int) -> str:
        """Returns how an id below the control tokens is spelt."""
        return self._text.id_to_piece(token)

    def _is_text(self, token: int) -> bool:
        return 0 <= token < self.fake_token_id and token != self.unk_id and not self._text.is_control(token)


def _bounded(text: str, at_start: bool) -> tuple[str, bool]:
    """Returns a text as sentencepiece takes it, and whether a word boundary was put before it."""
    text = _SURROGATES.sub("\ufffd", text)
    boundary = at_start and text != "" and text[0] not in (" ", WORD_BOUNDARY)
    return (" " + text if boundary else text), boundary


def _parse(model: bytes) -> sentencepiece_model_pb2.ModelProto:
    """Parses a sentencepiece file and checks that it is one this tokenizer honours; raises UserError."""
    spec = sentencepiece_model_pb2.ModelProto()
    try:
        spec.ParseFromString(model)
        names = {piece.piece for piece in spec.pieces}
        sentencepiece.SentencePieceProcessor().load_from_serialized_proto(model)
    except Exception as error:  # protobuf and sentencepiece raise types of their own
        raise UserError(f"{len(model)} bytes that are not a sentencepiece model ({error})") from None
    trainer = spec.trainer_spec
    if trainer.model_type != trainer.BPE:
        raise UserError("the sentencepiece model is not of type BPE; train it with model_type='bpe'")
    if spec.normalizer_spec.precompiled_charsmap:
        raise UserError(
            f"the sentencepiece model rewrites text ({spec.normalizer_spec.name}); "
            "train it with normalization_rule_name='identity'"
        )
    if min(trainer.unk_id, trainer.bos_id, trainer.eos_id) < 0:
        raise UserError("the sentencepiece model lacks an unk, bos or eos piece; train it with all three")
    for name in CONTROL_TOKENS:
        if name in names:
            raise UserError(f"the sentencepiece model holds {name} as a piece, so text could forge it; train without")
    return spec


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Trains a small byte-fallback BPE model with the trainer flags of Mistral's; equal texts give equal bytes.

    Args:
      texts: what to train on; surrogates become U+FFFD.
      vocab_size: the most pieces, 259 of which are bytes and specials; fewer come out where the texts hold fewer.

    Returns:
      The sentencepiece model file.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(_SURROGATES.sub("\ufffd", text) for text in texts),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        pad_id=-1,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()
