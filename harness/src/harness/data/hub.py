"""The named corpora of the Hugging Face hub, each row's text or instruction, through `datasets`."""

from harness.errors import UserError

SOURCES = {
    "wikitext2": ("Salesforce/wikitext", {"name": "wikitext-2-raw-v1"}),
    "ptb": (
        "ptb-text-only/ptb_text_only",
        {"data_dir": "penn_treebank", "revision": "refs/convert/parquet"},
    ),
    "c4": ("allenai/c4", {}),
    "pileval": ("mit-han-lab/pile-val-backup", {}),
    "alpaca": ("tatsu-lab/alpaca", {}),
    "dolly": ("databricks/databricks-dolly-15k", {}),
}
# GPTQ's shards: the first of 1,024 and of 8.
C4_SHARDS = {
    "train": "en/c4-train.00000-of-01024.json.gz",
    "validation": "en/c4-validation.00000-of-00008.json.gz",
}


def load(name: str, split: str):
    """One split of a named corpus as a `datasets.Dataset`; UserError where it cannot be had."""
    repository, options = SOURCES[name]
    if name == "c4":
        # One shard of many: the sizes recorded for the whole split would not match.
        shard = {split: C4_SHARDS[split]}
        options = {"data_files": shard, "verification_mode": "no_checks"}
    return fetch(name, repository, split, options)


def fetch(name: str, repository: str, split: str, options: dict):
    """One split of any repository, called ``name`` in the error; as :func:`load`."""
    import datasets

    try:
        return datasets.load_dataset(repository, split=split, **options)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{name}: the hub's {repository} could not be had ({reason}); "
            "give a local file or folder, or the embedded 'stdlib'"
        ) from error
