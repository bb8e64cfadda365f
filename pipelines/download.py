"""Stage download: reads `dataset:` of params.yaml, writes data/raw (the archive as published, and its card)."""

from fadeformer import params
from fadeformer.datasets import sources
from fadeformer.files import whole_folder
from pipelines import paths, stage


def main() -> str:
    """Brings the data set."""
    wanted = params.load(paths.PARAMS).dataset
    with whole_folder(paths.RAW) as folder:
        facts = sources.fetch(
            **wanted.model_dump(), downloads=paths.DOWNLOADS, lock=paths.PINS, salt=paths.SALT, into=folder
        )
    return f"{facts.file}, {facts.task}, {len(facts.classes)} classes, sha256 {facts.sha256[:16]}. {facts.note}".strip()


if __name__ == "__main__":
    stage.run("download", main)
