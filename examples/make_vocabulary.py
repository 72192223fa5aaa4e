"""Builds a small `ice_text.model` in the layout of the ChatGLM-6B vocabulary.

    python examples/make_vocabulary.py [--pieces 4000] [--output ice_text.model] [FILES...]

FILES are JSON lines `{"topic": ..., "turns": [{"ask": [...], "answer": "..."}, ...]}`, where `ask`
lists ways to ask one thing; the dialogues beside this script are the default. The same text and
number of pieces give the same file with the same version of SentencePiece. Needs protobuf.
"""

import argparse
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as proto

HERE = Path(__file__).resolve().parent
CONTROL = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
WHITE_SPACE = ["<|tab|>", *(f"<|blank_{k}|>" for k in range(2, 81))]


def read_lines(files: Iterable[str | Path]) -> Iterator[str]:
    """Yields the training text of dialogue files: each question and answer, and whole rounds.

    Raises OSError for a file that cannot be read, ValueError for one in another form.
    """
    for file in files:
        with open(file, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    turns = [(turn["ask"], turn["answer"]) for turn in json.loads(line)["turns"]]
                except (KeyError, TypeError, ValueError) as error:
                    raise ValueError(
                        f"{file}, line {number}: expected a JSON object "
                        '{"turns": [{"ask": [...], "answer": "..."}, ...]}, '
                        f"got {line.strip()[:80]!r}."
                    ) from error
                for index, (ask, answer) in enumerate(turns):
                    yield from ask
                    yield answer
                    yield f"[Round {index}]\n问：{ask[0]}\n答：{answer}"


def build_vocabulary(lines: Iterable[str], pieces: int) -> bytes:
    """Trains a vocabulary on lines of text.

    Args:
        lines: training text; line breaks inside are kept as `<n>`.
        pieces: size of the vocabulary, with the 350 special and byte pieces. Text that is too
            short for so many gives fewer.

    Returns:
        A serialised SentencePiece `ModelProto`, the contents of `ice_text.model`: `<unk> <s> </s>
        <pad> <n> ▁`, the other ordinary pieces from frequent to rare, 8 control pieces, `<|tab|>`
        and `<|blank_2|>` to `<|blank_80|>`, the 256 bytes.

    Raises ValueError for too few pieces, and SentencePiece's RuntimeError for text without words
    or with more kinds of characters than pieces.
    """
    later = len(CONTROL) + len(WHITE_SPACE)
    if pieces <= later + 262:
        raise ValueError(f"A vocabulary needs more than {later + 262} pieces, got {pieces}.")
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line.replace("\n", "<n>") for line in lines]),
        model_writer=trained,
        vocab_size=pieces - later,
        hard_vocab_limit=False,  # fewer pieces are fine for a short text
        # From here on, the settings of the release.
        model_type="unigram",
        normalization_rule_name="nmt_nfkc",
        character_coverage=0.9999,
        split_digits=True,
        byte_fallback=True,
        user_defined_symbols=["<n>"],
        pad_id=3,
        num_threads=1,  # more would make the order of sums, and so the file, a matter of luck
        minloglevel=2,
    )
    model = proto.ModelProto.FromString(trained.getvalue())
    return _arrange(model).SerializeToString(deterministic=True)


def _arrange(model: proto.ModelProto) -> proto.ModelProto:
    """Puts the pieces of a trained model into the order of the release."""
    kinds = proto.ModelProto.SentencePiece
    byte = [piece for piece in model.pieces if piece.type == kinds.BYTE]
    ordinary = [piece for piece in model.pieces if piece.type == kinds.NORMAL]
    first = [piece for piece in model.pieces if piece.type not in (kinds.BYTE, kinds.NORMAL)]
    ordinary.sort(key=lambda piece: (piece.piece != "▁", -piece.score))
    control = [kinds(piece=name, score=0, type=kinds.CONTROL) for name in CONTROL]
    space = [kinds(piece=name, score=0, type=kinds.USER_DEFINED) for name in WHITE_SPACE]

    arranged = proto.ModelProto()
    arranged.CopyFrom(model)
    del arranged.pieces[:]
    arranged.pieces.extend([*first, *ordinary, *control, *space, *byte])
    return arranged


def main() -> None:
    parser = argparse.ArgumentParser(description="Builds a small ChatGLM-6B vocabulary.")
    parser.add_argument("files", nargs="*", metavar="FILES", help="dialogues, as JSON lines")
    parser.add_argument("--pieces", type=int, default=4000, help="size of the vocabulary")
    parser.add_argument("--output", default="ice_text.model", help="where to write it")
    arguments = parser.parse_args()
    files = arguments.files or [HERE / "dialogues_zh.jsonl", HERE / "dialogues_en.jsonl"]
    data = build_vocabulary(read_lines(files), arguments.pieces)
    Path(arguments.output).write_bytes(data)
    size = len(proto.ModelProto.FromString(data).pieces)
    print(f"{arguments.output}: {size} pieces, {len(data)} bytes")


if __name__ == "__main__":
    main()
