"""Exported graphs give the scores of the classifier in a process without this library.

test_classifier.py covers the other tasks.
"""

import json
import subprocess
import sys

import numpy as np
import pytest

from fadeformer.errors import UserError
from fadeformer.inference import export
from tests.packages import FADE, images, load, write_model

# Programs for a process that does not import this library.
RUN = {
    "onnx": """
import sys, numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
for name in sys.argv[2:]:
    np.save(f"scores-{name}", session.run(["scores"], {"images": np.load(name)})[0])
print(session.get_modelmeta().custom_metadata_map["fadeformer.classes"])
assert "torch" not in sys.modules and "fadeformer" not in sys.modules
""",
    "program": """
import sys, numpy as np, torch
extra = {"fadeformer.classes": ""}
program = torch.export.load(sys.argv[1], extra_files=extra).module()
for name in sys.argv[2:]:
    np.save(f"scores-{name}", program(torch.from_numpy(np.load(name))).detach().numpy())
print(extra["fadeformer.classes"])
assert "fadeformer" not in sys.modules
""",
}
SUFFIX = {"onnx": ".onnx", "program": ".pt2"}
DIFFUSION = {"variant": "diffusion", "after_blocks": [1, "last"], "num_heads": 4, "dropout": 0.1}


@pytest.mark.parametrize(
    ("kind", "format_", "channels", "fade"), [("grades", "onnx", 3, DIFFUSION), ("findings", "program", 1, FADE)]
)
def test_graph_gives_same_scores_in_fresh_process(kind, format_, channels, fade, tmp_path, monkeypatch):
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "1")
    monkeypatch.setenv("HOME", str(tmp_path))
    classifier = load(write_model(tmp_path, kind, channels=channels, fade=fade))
    path = tmp_path / f"graph{SUFFIX[format_]}"
    assert export.export_model(classifier, format_, path) <= 1e-5
    batches = {f"{count}.npy": images(count, channels=channels) for count in (1, 5)}
    for name, pixels in batches.items():
        np.save(tmp_path / name, pixels)
    command = [sys.executable, "-c", RUN[format_], str(path), *batches]
    process = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout) == list(classifier.classes)
    for name, pixels in batches.items():
        np.testing.assert_allclose(np.load(tmp_path / f"scores-{name}"), classifier.predict_proba(pixels), atol=1e-5)


def test_missing_onnx_package_is_named(tmp_path, monkeypatch):
    classifier = load(write_model(tmp_path))
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(UserError, match="ONNX needs onnxscript: run `pip install onnxscript`"):
        export.export_model(classifier, "onnx", tmp_path / "graph.onnx")


def test_graph_with_different_scores_is_removed(tmp_path, monkeypatch):
    classifier = load(write_model(tmp_path))
    monkeypatch.setattr(export.ScoringModule, "forward", lambda self, x: self.classifier.forward(x)[1].softmax(dim=1))
    with pytest.raises(UserError, match="scores of the exported graph differ"):
        export.export_model(classifier, "program", tmp_path / "graph.pt2")
    assert not list(tmp_path.glob("*.pt2"))
