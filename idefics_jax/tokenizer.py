"""The tokenizer: sentencepiece for text, three control tokens beside it.

The ids are those of transformers' LlamaTokenizer with `legacy=False`, which Idefics2 was released with: a word
boundary is put before the text that opens a sequence (unless it brings its own space), and before no other. The
control tokens `<fake_token_around_image>`, `<image>` and `<end_of_utterance>` follow the sentencepiece vocabulary
(32000, 32001, 32002 on Mistral's). They exist only as ids: text that spells one is encoded as text.
"""

import io
import pathlib

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

FAKE_TOKEN = "<fake_token_around_image>"
IMAGE_TOKEN = "<image>"
END_OF_UTTERANCE = "<end_of_utterance>"

_WORD_BOUNDARY = "\u2581"  # how sentencepiece writes a space


class Tokenizer:
    """A sentencepiece model and the ids of the control tokens.

    Attributes:
      model: the sentencepiece file, byte for byte.
      vocab_size: ids in use, the control tokens among them.
      unk_id, bos_id, eos_id: as the sentencepiece model has them.
      pad_id: the unknown id, as released; padding is marked by segment 0, never by this id.
      fake_token_id, image_token_id, end_of_utterance_id: the control tokens.
    """

    def __init__(self, model: bytes):
        spec = sentencepiece_model_pb2.ModelProto()
        try:
            spec.ParseFromString(model)
            # The word boundary is put by `encode_spans`; sentencepiece would put one before every stretch of text.
            spec.normalizer_spec.add_dummy_prefix = False
            spec.normalizer_spec.remove_extra_whitespaces = False
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=spec.SerializeToString())
        except Exception as error:  # protobuf and sentencepiece each raise their own types
            raise ValueError(f"{len(model)} bytes are not a sentencepiece model ({error})") from None
        self.model = model
        self.unk_id, self.bos_id, self.eos_id = (
            self._pieces.unk_id(),
            self._pieces.bos_id(),
            self._pieces.eos_id(),
        )
        for name, value in (("unk", self.unk_id), ("bos", self.bos_id), ("eos", self.eos_id)):
            if value < 0:
                raise ValueError(f"the sentencepiece model has no {name} piece; train it with one")
        self.pad_id = self.unk_id
        text_ids = self._pieces.get_piece_size()
        self.fake_token_id, self.image_token_id, self.end_of_utterance_id = range(text_ids, text_ids + 3)
        self.vocab_size = text_ids + 3

    @classmethod
    def load(cls, path: str | pathlib.Path) -> "Tokenizer":
        """Reads a sentencepiece model file; raises FileNotFoundError or ValueError naming it."""
        path = pathlib.Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; a sentencepiece model is expected there")
        try:
            return cls(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def encode(self, text: str, *, at_start: bool) -> list[int]:
        """Returns the ids of a stretch of text; see `encode_spans`."""
        return self.encode_spans(text, at_start=at_start)[0]

    def encode_spans(self, text: str, *, at_start: bool) -> tuple[list[int], list[int]]:
        """Encodes a stretch of text between control tokens.

        Args:
          text: any string; no substring of it becomes a control token, and lone surrogates become U+FFFD.
          at_start: whether the text opens the sequence, and so gets a word boundary before it.

        Returns:
          The ids, and for each id the index of the character of `text` it begins at.
        """
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if _has_surrogate(text) else text
        boundary = at_start and text != "" and not text.startswith((" ", _WORD_BOUNDARY))
        encoded = self._pieces.encode(" " + text if boundary else text, return_type="offset_mapping")
        begins = [max(begin - boundary, 0) for begin, _ in encoded["offsets"]]
        return encoded["ids"], begins

    def decode(self, ids: list[int]) -> str:
        """Returns the text of ids without control tokens and without the word boundary that opens it."""
        text = self._pieces.decode([int(token) for token in ids if self._is_text(int(token))])
        return text.removeprefix(" ")

    def _is_text(self, token: int) -> bool:
        return 0 <= token < self.fake_token_id and not self._pieces.is_control(token) and token != self.unk_id


def train_tokenizer(texts, vocab_size: int) -> bytes:
    """Trains a small byte-fallback BPE model with the trainer flags of Mistral's; the same texts give the same bytes.

    Args:
      texts: an iterable of strings.
      vocab_size: the most pieces, of which 259 are bytes and specials; fewer come out if the texts hold fewer.

    Returns:
      The sentencepiece model file.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
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


def _has_surrogate(text: str) -> bool:
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)
