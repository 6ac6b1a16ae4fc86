"""Checkpoint directories: written beside their place and renamed, checked before they are read.

checkpoints/step-N/
    model.safetensors, config.json, tokenizer.json ...   a Hugging Face directory of the policy, adapters merged
    zero/                                                weights and optimizer state, each rank its part (DeepSpeed)
    reference/model.safetensors                          the reference, where there is one: a model, or adapters alone
    rng-RANK.pt                                          random number generators of each rank
    state.json                                           steps done, ranks, stage, and the driver's data position
    manifest.json                                        size and SHA-256 of every other file
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from catalog.atomic import CannotWrite, writing

MANIFEST = "manifest.json"
STATE = "state.json"
SFT = "sft"
"""Name of the checkpoint of the weights before RL, and of the folder of its epochs beside `checkpoints`."""
SFT_PROGRESS = "progress.json"
"""There, once an epoch is whole."""
WRITTEN_FOR = {"zero_stage": "learner.zero_stage", "dtype": "learner.dtype", "lora_rank": "learner.lora.rank"}
"""What of a checkpoint's state its reader must have alike, and the key of the configuration that says it."""
REFERENCE = "reference/model.safetensors"
"""In a folder of its own: vLLM takes every safetensors file of a model's folder for a part of its weights."""
PREFIX = "step-"
WRITERS = ("inline_container.cc", "I/O error")
"""What torch's errors and those of safetensors hold where a file cannot be written: theirs are no OSError."""


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged or of another kind of run; the message names it and an intact one."""


@contextmanager
def writing_tensors(path: Path) -> Iterator[None]:
    """catalog.atomic.writing where the body writes with torch, DeepSpeed or safetensors, too."""
    try:
        with writing(path):
            yield
    except (RuntimeError, SafetensorError) as error:
        if not any(sign in str(error) for sign in WRITERS):
            raise
        raise CannotWrite(f"{path} cannot be written; is the disk full? ({error})") from error


def temporary_path(path: Path) -> Path:
    """Where a checkpoint is written before it takes its name; on the same file system."""
    return path.with_name(f".{path.name}.partial")


def begin(path: Path) -> Path:
    """An empty temporary folder for the checkpoint `path`; what an interrupted write left there is dropped."""
    temporary = temporary_path(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def commit(path: Path, state: dict[str, Any], keep: int | None = None) -> None:
    """Seal the temporary folder with its state and manifest, and rename it to `path`.

    keep: number of checkpoints beside `path` that stay, the newest ones; None keeps all.
    """
    temporary = temporary_path(path)
    _write(temporary / STATE, json.dumps(state, indent=1))
    files = sorted(file for file in temporary.rglob("*") if file.is_file())
    readable = (temporary / STATE).stat().st_mode
    for file in files:
        file.chmod(readable)  # safetensors gives its files to their owner alone, whatever the umask says
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(_synced_sha256, files))
    manifest = {
        str(file.relative_to(temporary)): {"bytes": file.stat().st_size, "sha256": digest}
        for file, digest in zip(files, digests, strict=True)
    }
    _write(temporary / MANIFEST, json.dumps(manifest, indent=1))
    for folder in (temporary, *(inner for inner in temporary.rglob("*") if inner.is_dir())):
        _sync_folder(folder)
    replaced = _set_aside(path) if path.exists() else None  # the same step again, after a resume; or a better best
    temporary.rename(path)
    _sync_folder(path.parent)
    if replaced is not None:
        shutil.rmtree(replaced)
    if keep is not None:
        for old in steps(path.parent)[keep:]:
            remove(old)


def discard(path: Path) -> None:
    """Drop what a write of `path` that failed has left, which may be why the disk is full."""
    shutil.rmtree(temporary_path(path), ignore_errors=True)


def sweep(folder: Path) -> None:
    """Drop what interrupted writes, deletions and conversions to other ranks have left in a folder of checkpoints."""
    for pattern in (".*.partial", ".*.deleted", ".*.universal"):
        for path in folder.glob(pattern):
            shutil.rmtree(path)


def read_state(path: Path) -> dict[str, Any]:
    """What commit was given; of a checkpoint in which find_fault finds nothing."""
    return json.loads((path / STATE).read_text())


def check_readers(path: Path, ours: Mapping[str, Any]) -> None:
    """Raise CheckpointError where a learner of another ZeRO stage, precision or adapter rank wrote a checkpoint.

    ours: zero_stage, dtype and lora_rank of the learner that is to read it.
    """
    state = read_state(path)
    for name, key in WRITTEN_FOR.items():
        if state[name] != ours[name]:
            raise CheckpointError(
                f"{key} is {ours[name]}, but {path} was written with {state[name]}: give {key}={state[name]}, or "
                f"start another run from its weights with MODEL={path}"
            )


def check(path: Path, *, contents: bool = True) -> None:
    """Raise CheckpointError naming what is wrong with a checkpoint, and the newest other one that is intact.

    contents: as find_fault.
    """
    if fault := find_fault(path, contents=contents):
        others = [other for other in steps(path.parent) if other != path and find_fault(other) is None]
        if others:
            offer = f"{others[0].name} is intact: delete {path.name} to go on from there"
        elif find_fault(sft := path.parent / SFT) is None:
            offer = f"no other is intact: delete all {PREFIX}N to go on from {sft}"
        else:
            offer = "no other is intact"
        raise CheckpointError(f"checkpoint {path}: {fault}; {offer}")


def find_fault(path: Path, *, contents: bool = True) -> str | None:
    """What is wrong with a checkpoint, in words that name the file; None when every byte is as written.

    contents: False asks of files other than the state only whether each is there and has its size.
    """
    if not path.is_dir():
        return "does not exist"
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        written = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
        written[STATE]
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return f"{MANIFEST} is missing or not readable"
    for name, (size, _) in written.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    read = [name for name in written if contents or name == STATE]
    with ThreadPoolExecutor() as pool:
        for name, digest in zip(read, pool.map(_sha256, (path / name for name in read)), strict=True):
            if digest != written[name][1]:
                return f"{name} is damaged (its SHA-256 is not that of the manifest)"
    number, done = _number(path), read_state(path).get("driver", {}).get("steps_done")
    if number is not None and done not in (None, number):
        return f"it is that of step {done} by its {STATE}: name it {PREFIX}{done}"
    return None


def steps(folder: Path) -> list[Path]:
    """Complete checkpoints step-N in `folder`, the newest first."""
    numbered = {number: path for path, number in _numbered(folder)}
    return [numbered[number] for number in sorted(numbered, reverse=True)]


def latest(folder: Path) -> Path | None:
    """The newest checkpoint of a folder, if any; whether it is intact is for `check` to say."""
    return next(iter(steps(folder)), None)


def newest(folder: Path) -> Path | None:
    """The newest checkpoint of a folder or, before there is any, the weights after SFT, if they are there."""
    sft = folder / SFT
    return latest(folder) or (sft if sft.is_dir() else None)


def steps_done(folder: Path) -> int:
    """The number of the newest checkpoint of a folder; 0 without any."""
    return max((number for _, number in _numbered(folder)), default=0)


def _numbered(folder: Path) -> Iterator[tuple[Path, int]]:
    for path in folder.glob(f"{PREFIX}*"):
        if (number := _number(path)) is not None and path.is_dir():
            yield path, number


def _number(path: Path) -> int | None:
    """N of the name step-N; None of any other."""
    number = path.name.removeprefix(PREFIX)
    return int(number) if number != path.name and number.isascii() and number.isdigit() else None


def remove(path: Path) -> None:
    """Delete a checkpoint; where that is interrupted, what remains does not have its name."""
    shutil.rmtree(_set_aside(path))


def _set_aside(path: Path) -> Path:
    """Where a checkpoint is that has lost its name; what an interrupted deletion left there is dropped."""
    leaving = path.with_name(f".{path.name}.deleted")
    shutil.rmtree(leaving, ignore_errors=True)
    path.rename(leaving)
    return leaving


def _synced_sha256(file: Path) -> str:
    """Of a file that is then on disk."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
    return _sha256(file)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write(file: Path, text: str) -> None:
    with file.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
