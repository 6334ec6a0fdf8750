"""The kinds of documents, and the module of each that knows its schema and turns its rows into documents."""

from data_pipelines import cauldron, messages, obelics, pages, pairs

KINDS = {"cauldron": cauldron, "obelics": obelics, "pairs": pairs, "pdf": pages, "text": messages}
# The rows of these are conversations: their modules also have `turns` and `with_turns`.
CONVERSATIONS = ("cauldron", "text")
