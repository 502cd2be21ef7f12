"""LLaMA-Factory's columns of an aligned data set, so that ours can be mixed with others; and where a record came from."""

from typing import Any

import datasets

from ..media import Conversation
from ..records.clips import decode_clip
from ..records.table import Layout

FEATURES = datasets.Features(
    {
        "_prompt": [{"content": datasets.Value("string"), "role": datasets.Value("string")}],
        "_response": [{"content": datasets.Value("string"), "role": datasets.Value("string")}],
        "_system": datasets.Value("string"),
        "_tools": datasets.Value("string"),
        "_images": [datasets.Value("string")],
        "_videos": [datasets.Value("string")],
        "_audios": [datasets.Value("string")],
        "_unlearnt": [datasets.Value("int32")],
        "_source": datasets.Value("string"),
    }
)


def to_row(conversation: Conversation) -> dict[str, Any]:
    """A conversation as a row of `FEATURES`."""
    messages = [{"content": text, "role": role} for role, text in conversation.messages]
    return {
        "_prompt": messages[:-1],
        "_response": messages[-1:],
        "_system": conversation.system,
        "_tools": conversation.tools,
        "_images": conversation.images or None,
        "_videos": [clip.encode() for clip in conversation.videos] or None,
        "_audios": None,
        "_unlearnt": list(conversation.unlearnt) or None,
        "_source": conversation.source,
    }


def from_row(row: dict[str, Any]) -> Conversation:
    """The conversation of a row that `to_row` made."""
    messages = [(message["role"], message["content"]) for message in (*row["_prompt"], *row["_response"])]
    return Conversation(
        messages,
        list(row["_images"] or ()),
        [decode_clip(video) for video in row["_videos"] or ()],
        row["_system"] or "",
        row["_tools"] or "",
        tuple(row["_unlearnt"] or ()),
        row["_source"],
    )


LAYOUT = Layout(FEATURES, to_row, from_row, videos="_videos", images="_images")
