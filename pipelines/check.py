"""`python -m pipelines.check`: params.yaml alone, so that `make repro` tells a typo before DVC clears any output."""

from fadeformer import params
from pipelines import paths, stage


def main() -> str:
    """Reads and checks params.yaml."""
    wanted = params.load(paths.PARAMS)
    return f"{paths.PARAMS} is valid: {wanted.dataset.name}, {wanted.model.backbone}, seed {wanted.seed}"


if __name__ == "__main__":
    stage.run("check", main)
