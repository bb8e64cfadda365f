"""`python -m pipelines.check`: `make repro` tells a typo in params.yaml before DVC clears any output.

And what a kill has cut off of DVC's own files is mended, which it refuses to read.
"""

from fadeformer import params
from pipelines import cut_off, paths, stage


def main() -> str:
    """Reads and checks params.yaml."""
    cut_off.mend()
    wanted = params.load(paths.PARAMS)
    return f"{paths.PARAMS} is valid: {wanted.dataset.name}, {wanted.model.backbone}, seed {wanted.seed}"


if __name__ == "__main__":
    stage.run("check", main)
