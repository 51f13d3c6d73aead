"""Data files, read whole and strictly before any model is loaded.

    source       one entry of ``datasets`` → a `DataFile`; every bad row named as ``file:line``
    rows         what a row is
    strictjson   JSON without what other readers take silently: a key twice, NaN, NUL, half a surrogate pair
    tools        tool schemas and tool calls

Nothing here knows tokens.
"""

from adapterhub.trainers.data.rows import Conversation, Row, Text
from adapterhub.trainers.data.source import DataFile, read_source

__all__ = ["Conversation", "DataFile", "Row", "Text", "read_source"]
