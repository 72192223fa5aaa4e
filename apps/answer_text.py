"""The text of an answer while it grows."""

TRAINING_DATE = "[[训练时间]]"  # replaced in responses
# Ends of a response that later text may change, the longest first.
UNSETTLED = (*(TRAINING_DATE[:length] for length in range(len(TRAINING_DATE) - 1, 0, -1)), *",!:;?")


def settled(response: str) -> str:
    """The beginning of a growing response that no later text can change.

    `process_response` widens a last punctuation mark if a Chinese character follows, and replaces a whole
    `[[训练时间]]`.
    """
    if not response.endswith(UNSETTLED):
        return response
    return next(response[: -len(end)] for end in UNSETTLED if response.endswith(end))
