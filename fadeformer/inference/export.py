"""A trained network as one graph, from uint8 images to calibrated scores, for programs that do not know this library.

The graph holds normalisation, network, head and calibration in float32; its scores are those of `Classifier` but for
rounding. It takes any number of images of the network's size, and no files: who uses it decodes and resizes.
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

SCORE_TOLERANCE = 1e-5  # in a score
INPUT_NAME, OUTPUT_NAME = "images", "scores"  # input and output of the ONNX graph


class ScoringModule(nn.Module):
    """uint8 images (images, side, side, channels) to calibrated scores (images, classes), float32."""

    slope: Tensor
    offset: Tensor

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.model, self.classifier = classifier.model, classifier
        self.register_buffer("slope", torch.tensor(classifier.calibration.slope))
        self.register_buffer("offset", torch.tensor(classifier.calibration.offset))

    def forward(self, images: Tensor) -> Tensor:
        """As `Classifier.scores`, all in torch."""
        _, logits = self.classifier.forward(images)
        task = self.classifier.task
        scaled = self.slope * task.calibration_logits(logits) + self.offset  # the offset is 0 for exclusive classes
        return scaled.sigmoid() if task.multi_label else scaled.softmax(dim=1)


def export_model(classifier: Classifier, kind: str, path: Path) -> float:
    """Writes the graph.

    Args:
        classifier: on the CPU.
        kind: `onnx`, or `program` (what `torch.export.load` reads, a .pt2).
        path: of the file.

    Returns:
        The largest difference between its scores and the classifier's, on random images.

    Raises:
        UserError: a package that writes or checks ONNX is missing, or the graph does not give the same scores.
    """
    if kind == "onnx":
        missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
        if missing:
            raise UserError(f"ONNX needs {' and '.join(missing)}: run `pip install {' '.join(missing)}`, then again")
    side, channels = classifier.input_config["image_size"], classifier.input_config["channels"]
    draw = np.random.default_rng(0)
    two, three = (draw.integers(0, 256, (n, side, side, channels), dtype=np.uint8) for n in (2, 3))
    with atomic_write(path) as temporary, torch.inference_mode(False), torch.no_grad():
        write, score = {"onnx": (_write_onnx, _run_onnx), "program": (_write_program, _run_program)}[kind]
        batch = ({0: torch.export.Dim("batch")},)
        write(ScoringModule(classifier).eval(), (torch.from_numpy(two),), batch, graph_metadata(classifier), temporary)
        difference = float(np.abs(score(temporary, three) - classifier.predict_proba(three)).max())
        if not difference <= SCORE_TOLERANCE:
            raise UserError(f"the exported graph gives other scores, by up to {difference:.2g}; it was not written")
    return difference


def graph_metadata(classifier: Classifier) -> dict[str, str]:
    """What a user of the graph must know, as text by name: in ONNX's metadata_props, and the program's extra files."""
    values = {
        "classes": list(classifier.classes),
        "input": classifier.input_config,
        "task": classifier.task.name,
        "points": {
            name: dict(classifier.operating_point(name).thresholds) for name in classifier.operating_points or ()
        },
    }
    return {f"fadeformer.{name}": json.dumps(value, ensure_ascii=False) for name, value in values.items()}


def _write_onnx(graph: nn.Module, example: Any, batch: Any, told: dict[str, str], path: Path) -> None:
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it warns of what it does not make smaller
    program = torch.onnx.export(
        graph,
        example,
        dynamo=True,
        dynamic_shapes=batch,
        input_names=[INPUT_NAME],
        output_names=[OUTPUT_NAME],
        verbose=False,
    )
    if program is None:
        raise RuntimeError("torch.onnx.export gave no program")
    program.model.metadata_props.update(told)
    program.save(path)


def _run_onnx(path: Path, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run([OUTPUT_NAME], {INPUT_NAME: pixels})[0])


def _write_program(graph: nn.Module, example: Any, batch: Any, told: dict[str, str], path: Path) -> None:
    program = torch.export.export(graph, example, dynamic_shapes=batch)
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files=told)


def _run_program(path: Path, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    with path.open("rb") as file:
        program = torch.export.load(file)
    return np.asarray(program.module()(torch.from_numpy(pixels)))
