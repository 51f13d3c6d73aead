"""Data files, read whole and strictly before any model is loaded.

    source       one entry of ``datasets`` → a `DataFile`; every bad row named as ``file:line``
    places       a file, an object on S3, a folder or a data set of the Hub
    files        JSON lines, a JSON array, CSV, Parquet
    formats      the formats by name, and how one is told from a row's columns
    chat         rows of messages              instruct    rows of columns: instruction and output, …
    plain        text, segments, token ids     messages    one message, however it is spelt
    preferences  two answers to one prompt, or one and whether it is good
    rows         what a row is once it is read
    strictjson   JSON without what other readers take silently: a key twice, NaN, NUL, half a surrogate pair
    tools        tool schemas and tool calls

Nothing here knows tokenizers.
"""

from adapterhub.trainers.data.rows import (
    Conversation,
    Judged,
    Pair,
    Preference,
    Row,
    Segments,
    Text,
    Tokens,
    with_system,
)
from adapterhub.trainers.data.source import DataFile, read_source

__all__ = [
    "Conversation",
    "DataFile",
    "Judged",
    "Pair",
    "Preference",
    "Row",
    "Segments",
    "Text",
    "Tokens",
    "read_source",
    "with_system",
]
