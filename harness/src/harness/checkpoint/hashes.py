"""What tells one model from another, for results that are kept and runs that are resumed.

Weight files of up to 256 MB in all are hashed whole. Of larger ones every tensor is: whole up to
1 MiB, else in 64 pieces of 4 KiB from all over it, so that a model of 70 B parameters takes
seconds, and any tensor that was made anew is noticed. config.json is hashed whole.
"""

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

from harness.checkpoint import weight_files
from harness.paths import read_json

WHOLE = 1 << 28
WHOLE_TENSOR, PIECES, PIECE = 1 << 20, 64, 1 << 12
TOKENIZER = (
    "tokenizer*", "vocab*", "merges.txt", "*.model", "*.jinja", "special_tokens_map.json",
    "added_tokens.json", "chat_template*",
)  # fmt: skip


def of_model(folder: Path) -> str:
    """Of weights, config and tokenizer: what every measured number depends on."""
    tokenizer = {path for pattern in TOKENIZER for path in folder.glob(pattern) if path.is_file()}
    parts = model_files(folder) | {path.name: file_hash(path) for path in sorted(tokenizer)}
    return text_hash(repr(sorted(parts.items())))


def model_files(folder: Path) -> dict[str, str]:
    """Weight files and config.json by name: size and hash, see above."""
    config = read_json(folder / "config.json")
    paths, safe = weight_files.locate(folder, config)
    whole = sum(path.stat().st_size for path in paths) <= WHOLE
    files = {"config.json": file_hash(folder / "config.json")}
    for path in paths:
        stat = path.stat()
        key = (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
        name = path.relative_to(folder).as_posix()
        files[name] = f"{stat.st_size}:{_weights_hash(key, whole, safe)}"
    return files


@functools.lru_cache(maxsize=4096)  # the key tells a file that was written anew
def _weights_hash(key: tuple[str, int, int], whole: bool, safe: bool) -> str:
    path = Path(key[0])
    if whole:
        return file_hash(path)
    spans = _tensors(path) if safe else [(0, key[1])]
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for begin, size in spans:
            for offset, length in _pieces(size):
                file.seek(begin + offset)
                digest.update(file.read(length))
    return digest.hexdigest()[:16]


def _tensors(path: Path) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of the header and of every tensor of a safetensors file."""
    held = sorted(weight_files.header(path).values(), key=lambda stored: stored.offset)
    yield 0, held[0].offset if held else path.stat().st_size
    for stored in held:
        yield stored.offset, stored.nbytes


def _pieces(size: int) -> Iterator[tuple[int, int]]:
    if size <= WHOLE_TENSOR:
        yield 0, size
        return
    for number in range(PIECES):
        yield (size - PIECE) * number // (PIECES - 1), PIECE


def file_hash(path: Path) -> str:
    """Of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def sample_hash(path: Path, pieces: int = 256, part: int = 2**14) -> str:
    """Size and a hash of 4 MiB from all over a file: whether it is still what it was."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        for number in range(pieces):
            file.seek(max(0, size - part) * number // (pieces - 1))
            digest.update(file.read(part))
    return f"{size}:{digest.hexdigest()[:16]}"


def mark(path: Path) -> str | None:
    """What tells whether a finished file is still what it was; None where there is none."""
    return sample_hash(path) if path.is_file() else None


def tokens_hash(tokens) -> str:
    """Of token ids, a tensor of any shape."""
    shape = repr(tuple(tokens.shape)).encode()
    return hashlib.sha256(shape + tokens.contiguous().numpy().tobytes()).hexdigest()[:16]


def text_hash(text: str) -> str:
    """Of a text, such as the ``repr`` of questions."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]
