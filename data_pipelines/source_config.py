"""What a config says of a data set in a mixture."""

import dataclasses

from data_pipelines import filters
from data_pipelines.augmentation import Augmentation
from data_pipelines.filters import Filters
from data_pipelines.kinds import CONVERSATIONS, KINDS
from idefics_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """A data set in a mixture.

    Attributes:
      name: what its documents are called in messages and counts.
      kind: the schema of its files, a name in KINDS.
      paths: parquet files, what data_pipelines.prepare wrote (its folders, or shards in them), or the shards of a TFDS
        set, as paths or globs.
      weight: its share of the documents, relative to the other sources' weights.
      image_root: folder or index of the images that rows name instead of holding (image_files.py); None if there are
        none.
      window: row groups whose rows are shuffled together.
      augmentation: what chance changes about its documents.
      filters: what is taken out of it. An image that is taken out of a page is counted as a rejected document is.
      captions: (column, share of the documents) of each text that chance takes for a pair's caption; none for the
        column `caption` alone. A pair without the text drawn has another of them (pairs.with_caption).
      features: (field, feature) of each field of a row that a TFDS set calls otherwise than tfds_source.FIELDS does.
      document_tokens: the most tokens of one of its documents, if that is less than `data.document_tokens`.
    """

    name: str
    kind: str
    paths: tuple[str, ...]
    weight: float = 1.0
    image_root: str | None = None
    window: int = 4
    augmentation: Augmentation = Augmentation()
    filters: Filters = Filters()
    captions: tuple[tuple[str, float], ...] = ()
    features: tuple[tuple[str, str], ...] = ()
    document_tokens: int | None = None

    def __post_init__(self):
        where = f"source {self.name!r}"
        if self.kind not in KINDS:
            raise UserError(f"{where}: kind is {self.kind!r}; it must be one of {', '.join(KINDS)}")
        if not self.paths:
            raise UserError(f"{where}: paths is empty; name its parquet files")
        if self.image_root is not None and "://" in self.image_root:
            raise UserError(
                f"{where}: image_root is {self.image_root!r}; images are read from a disk: mount the bucket (gcsfuse), "
                "or copy it"
            )
        if not 0 < self.weight < float("inf"):
            raise UserError(f"{where}: weight is {self.weight!r}; it must be a positive number")
        of_turns = ", ".join(self.augmentation.of_turns_alone)
        if of_turns and self.kind not in CONVERSATIONS:
            raise UserError(f"{where}: {of_turns} is for kind {' or '.join(CONVERSATIONS)}, not {self.kind!r}")
        if self.document_tokens is not None and self.document_tokens < 1:
            raise UserError(f"{where}: document_tokens is {self.document_tokens!r}; it must be at least 1, or None")
        if self.window < 1:
            raise UserError(f"{where}: window is {self.window!r}; it must be at least 1 row group")
        filters.check_kind(self.filters, self.kind, where=where)
        if self.captions and self.kind != "pairs":
            raise UserError(f"{where}: captions are for kind 'pairs', not {self.kind!r}; take them out")
        for column, share in self.captions:
            if not 0 < share < float("inf"):
                raise UserError(f"{where}: the share of caption {column!r} is {share!r}; it must be a positive number")

    @property
    def is_random(self) -> bool:
        """Whether a row may give another document in another epoch."""
        return self.augmentation.is_random or len(self.captions) > 1
