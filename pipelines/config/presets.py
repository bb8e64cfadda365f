"""`python -m pipelines.config.presets NAME`: apply a preset of pipelines/config/presets to params.yaml."""

from __future__ import annotations

import sys
from pathlib import Path

from ruamel.yaml import YAML

from fadeformer.errors import UserError
from pipelines import paths, runner
from pipelines.config import overrides

PRESET_FOLDER = Path(__file__).resolve().parent / "presets"


def main() -> str:
    """Apply the preset that is named on the command line."""
    names = sorted(path.stem for path in PRESET_FOLDER.glob("*.yaml"))
    if len(sys.argv) != 2 or sys.argv[1] not in names:
        raise UserError(f"usage: make preset NAME=...; available presets: {', '.join(names)}")
    changes = YAML(typ="safe").load(PRESET_FOLDER / f"{sys.argv[1]}.yaml")
    overrides.apply_overrides(paths.PARAMS, changes)
    return f"params.yaml now has preset {sys.argv[1]}; `git diff params.yaml` shows the changes"


if __name__ == "__main__":
    runner.run("preset", main)
