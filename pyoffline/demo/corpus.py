"""The demo's text and tokenizer: Python's own standard library, and a byte-level BPE trained on it.

Not here: anything from the network. The same interpreter always gives the same files.
"""

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

VOCAB = 32000
EOS = "<|endoftext|>"
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}


def source_files() -> list[Path]:
    """The .py files of the standard library that runs this process, without its tests, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (p for p in root.rglob("*.py") if not SKIPPED & set(p.relative_to(root).parts))
    return sorted(files)


def read_texts(files: list[Path], limit: int) -> list[str]:
    """Contents of `files` until there are `limit` bytes of text; what is not UTF-8 is left out."""
    texts, size = [], 0
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        texts.append(text)
        size += len(text)
        if size >= limit:
            break
    return texts


def train_tokenizer(texts: list[str], folder: Path, vocab: int = VOCAB):
    """A byte-level BPE of `vocab` entries in `folder`, or the finished one that is there."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if (folder / "tokenizer.json").is_file():
        found = AutoTokenizer.from_pretrained(folder)
        if len(found) == vocab:
            return found
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts, vocab_size=vocab, min_frequency=2, special_tokens=[EOS], length=len(texts)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token=EOS, pad_token=EOS
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def pieces(texts: list[str], tokenizer, length: int) -> Iterator[str]:
    """Cuts of about `length` tokens at line ends, never shorter; the rest of a file is dropped."""
    for text in texts:
        if len(text) < 4 * length:
            continue
        offsets = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)[
            "offset_mapping"
        ]
        for i in range(0, len(offsets) - length, length):
            yield text[offsets[i][0] : offsets[i + length - 1][1]]


def long_pieces(texts: list[str], tokenizer, length: int) -> Iterator[str]:
    """`pieces` of neighbouring files, joined until there are characters enough for two."""
    wanted, joined, size = 16 * length, [], 0
    for text in texts:
        joined.append(text)
        size += len(text)
        if size >= wanted:
            break
    return pieces(["\n".join(joined)], tokenizer, length)


def write_samples(path: Path, rows: list[str]) -> None:
    """JSONL with one `text` a row."""
    with path.open("w", encoding="utf-8") as file:
        for text in rows:
            file.write(json.dumps({"text": text}) + "\n")
