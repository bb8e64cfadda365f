"""`python -m pipelines.check`, before DVC: a typo in params.yaml is told while all outputs are still there.

And what a kill has cut off of DVC's own files is mended, which DVC would refuse to read.
"""

from fadeformer import params
from pipelines import cut_off, paths, stage


def main() -> str:
    """Mends DVC's files, and checks params.yaml."""
    cut_off.mend()
    wanted = params.load(paths.PARAMS)
    return f"{paths.PARAMS} is valid: {wanted.dataset.name}, {wanted.model.backbone}, seed {wanted.seed}"


if __name__ == "__main__":
    stage.run("check", main)
