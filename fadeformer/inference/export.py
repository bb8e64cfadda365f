"""Export to ONNX or torch.export: one graph from uint8 images to calibrated scores, usable without this library.

The graph contains normalization, network, head and calibration in float32; its scores equal those of `Classifier` up to
rounding. It takes a batch of any size, of images of the input size: the caller decodes and resizes.
"""

from __future__ import annotations

import json
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fadeformer.errors import UserError
from fadeformer.inference.classifier import Classifier
from fadeformer.io.atomic import atomic_write

SCORE_TOLERANCE = 1e-5  # largest absolute difference of a score
INPUT_NAME, OUTPUT_NAME = "images", "scores"  # input and output of the ONNX graph


class ScoringModule(nn.Module):
    """Map uint8 images (images, side, side, channels) to calibrated float32 scores (images, classes)."""

    slope: Tensor
    offset: Tensor

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.model, self.classifier = classifier.model, classifier
        self.register_buffer("slope", torch.tensor(classifier.calibration.slope))
        self.register_buffer("offset", torch.tensor(classifier.calibration.offset))

    def forward(self, images: Tensor) -> Tensor:
        """Compute `Classifier.predict_proba` in torch alone."""
        _, logits = self.classifier.forward(images)
        task = self.classifier.task
        scaled = self.slope * task.calibration_logits(logits) + self.offset
        return scaled.sigmoid() if task.multi_label else scaled.softmax(dim=1)


def export_model(classifier: Classifier, file_format: str, path: Path) -> float:
    """Export a classifier and verify the scores of the graph.

    Args:
        classifier: on the CPU.
        file_format: `onnx`, or `program` (a .pt2 file for `torch.export.load`).
        path: output file.

    Returns:
        The largest difference between the scores of graph and classifier on random images.

    Raises:
        UserError: a package for ONNX is missing, or the scores differ by more than `SCORE_TOLERANCE`.
    """
    if file_format == "onnx":
        missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
        if missing:
            raise UserError(
                f"ONNX needs {' and '.join(missing)}: run `pip install {' '.join(missing)}` and export again"
            )
    side, channels = classifier.input_config["image_size"], classifier.input_config["channels"]
    rng = np.random.default_rng(0)
    example, check = (rng.integers(0, 256, (n, side, side, channels), dtype=np.uint8) for n in (2, 3))
    with atomic_write(path) as temporary, torch.inference_mode(False), torch.no_grad():
        write, run = {"onnx": (_write_onnx, _run_onnx), "program": (_write_program, _run_program)}[file_format]
        shapes = ({0: torch.export.Dim("batch")},)
        write(
            ScoringModule(classifier).eval(),
            (torch.from_numpy(example),),
            shapes,
            graph_metadata(classifier),
            temporary,
        )
        difference = float(np.abs(run(temporary, check) - classifier.predict_proba(check)).max())
        if not difference <= SCORE_TOLERANCE:
            raise UserError(f"the scores of the exported graph differ by up to {difference:.2g}; it was not written")
    return difference


def graph_metadata(classifier: Classifier) -> dict[str, str]:
    """Return the metadata of a graph as JSON text by name: ONNX metadata_props, or extra files of a program.

    `decision_weights` is null if the decision among exclusive classes is the most probable one.
    """
    values = {
        "classes": list(classifier.classes),
        "input": classifier.input_config,
        "task": classifier.task.name,
        "decision_weights": classifier.task.decision_weights or None,
        "points": {
            name: dict(classifier.operating_point(name).thresholds) for name in classifier.operating_points or ()
        },
    }
    return {f"fadeformer.{name}": json.dumps(value, ensure_ascii=False) for name, value in values.items()}


def _write_onnx(graph: nn.Module, example: Any, shapes: Any, metadata: dict[str, str], path: Path) -> None:
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it warns of constants that it does not fold
    program = torch.onnx.export(
        graph,
        example,
        dynamo=True,
        dynamic_shapes=shapes,
        input_names=[INPUT_NAME],
        output_names=[OUTPUT_NAME],
        verbose=False,
    )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    program.model.metadata_props.update(metadata)
    program.save(path)


def _run_onnx(path: Path, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run([OUTPUT_NAME], {INPUT_NAME: images})[0])


def _write_program(graph: nn.Module, example: Any, shapes: Any, metadata: dict[str, str], path: Path) -> None:
    program = torch.export.export(graph, example, dynamic_shapes=shapes)
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files=metadata)


def _run_program(path: Path, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    with path.open("rb") as file:
        program = torch.export.load(file)
    return np.asarray(program.module()(torch.from_numpy(images)))
