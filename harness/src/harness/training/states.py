"""The saved state of a training run on DeepSpeed: whole or not at all, and only the user's own."""

import errno
import json
import os
import pickle
import shutil
import stat
import zipfile
from pathlib import Path

from harness import distributed, paths
from harness.checkpoint import hashes, runs
from harness.errors import UserError, one_line


def save(engine, folder: Path, state: dict) -> None:
    """Trained weights, optimizer and schedule under ``folder``, beside a JSON ``state``; whole or
    not at all: state.json names the newest whole one, older ones are removed.

    Raises:
        UserError: the disk is full. The launcher ends the other ranks, which wait for this one.
    """
    name = f"step-{engine.global_steps}"
    try:
        engine.save_checkpoint(
            str(folder), tag=name, save_latest=False, exclude_frozen_parameters=_some_frozen(engine)
        )
    except (OSError, RuntimeError) as error:
        shutil.rmtree(folder / name, ignore_errors=True)
        # torch's writer of zip files tells a full disk by a position that it did not expect.
        if any(sign in str(error) for sign in ("inline_container", "PytorchStreamWriter")):
            error = OSError(errno.ENOSPC, str(error))
        raise paths.disk_error(folder, error) from error

    distributed.sum_number(0.0)  # every rank has written

    def point():
        marks = {}
        for path in [folder / name, *sorted((folder / name).rglob("*"))]:
            keep_to_user(path)
            paths.sync(path)
            if path.is_file():
                marks[str(path.relative_to(folder))] = hashes.sample_hash(path)
        record = {"tag": name, **state, "files": marks}
        paths.write_text(folder / "state.json", json.dumps(record, indent=1))
        keep_to_user(folder / "state.json")
        for old in folder.glob("step-*"):
            if old.name != name:
                shutil.rmtree(old)

    distributed.lead(point)


def load(engine, folder: Path) -> dict | None:
    """Take up the newest saved state; its JSON part, or None where there is none."""
    path = folder / "state.json"
    if not path.is_file():
        return None
    state = runs.read_state(path)
    _check_ours(folder)
    tag, marks = state.get("tag"), state.get("files")
    there = (folder / tag).rglob("*") if isinstance(tag, str) else []
    hashed = {str(p.relative_to(folder)): hashes.sample_hash(p) for p in there if p.is_file()}
    if not hashed or hashed != marks:
        raise UserError(f"the state in {folder} is damaged; start again with --no-resume.")
    loaded = None
    try:
        loaded, _ = engine.load_checkpoint(
            str(folder), tag=state["tag"], load_module_strict=not _some_frozen(engine)
        )
    except (pickle.UnpicklingError, EOFError, KeyError, zipfile.BadZipFile) as error:
        distributed.say(f"{folder}: {one_line(error)}")
    except RuntimeError as error:
        if "PytorchStreamReader" not in str(error):
            raise
    if loaded is None:
        raise UserError(f"{folder} holds no state that can be read; start again with --no-resume.")
    return state


def keep_to_user(path: Path) -> None:
    """Nobody but the user, who made ``path``, may write there."""
    path.chmod(path.stat().st_mode & ~0o022)


def _check_ours(folder: Path) -> None:
    """DeepSpeed's states are pickles, which run what they say: only those are read that this user
    wrote and nobody else can have changed."""
    if not hasattr(os, "getuid"):
        return
    for path in (folder.parent, folder, *folder.rglob("*")):
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            fault = "is a link"
        elif status.st_uid != os.getuid():
            fault = f"belongs to user {status.st_uid}"
        elif status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            fault = f"may be written by others (mode {stat.S_IMODE(status.st_mode):o})"
        else:
            continue
        raise UserError(
            f"{path} {fault}: a saved state runs code when it is read, so it has to be yours alone "
            "(chmod -R go-w on the folder, if you trust it); or start again with --no-resume."
        )


def _some_frozen(engine) -> bool:
    """Frozen weights are the source's: a state needs no copy of them."""
    return not all(p.requires_grad for p in engine.module.parameters())
