"""Paths of the stages' inputs and outputs; a test compares them with dvc.yaml."""

from pathlib import Path

PARAMS = Path("params.yaml")
DVC_LOCK = Path("dvc.lock")
NO_WEIGHTS = Path("data/weights/none")  # placeholder for "no weights": a DVC dependency must exist
NO_SPLIT = Path("data/adopted/none")  # placeholder for "no adopted split"
ADOPTED_SPLITS = Path("data/adopted")
NO_EXCLUSION = Path("data/excluded/none")  # placeholder for "no excluded image"
EXCLUDED = Path("data/excluded")
SPLITS = Path("data/splits")
DATASET_LOCK = Path("dataset.lock")
HASH_SALT = Path("data/salt")
DOWNLOADS = Path("data/downloads")
RAW = Path("data/raw")
MANIFEST = Path("data/manifest.parquet")
PROCESSED = Path("data/processed")
UNFINISHED_TRAININGS = Path(".cache/train")  # outside DVC's outputs, which DVC removes before a stage runs
MODELS = Path("models")
WEIGHTS = MODELS / "best_model.pth"
ARCHITECTURE = MODELS / "model.json"
OOD_STATISTICS = MODELS / "ood.safetensors"
REFERENCE = MODELS / "reference.parquet"
TRAINING_IMAGES = MODELS / "training_images.parquet"
HISTORY = MODELS / "history.csv"
RUN = MODELS / "run.json"
REPORTS = Path("reports")
VALIDATION = REPORTS / "validation"
VALIDATION_RESULT = VALIDATION / "validation.json"
PREDICTIONS = REPORTS / "predictions.parquet"
METRICS = REPORTS / "metrics.json"
INTERVALS = REPORTS / "intervals.json"
SUBGROUPS = REPORTS / "subgroups.json"
OPERATING_POINTS = REPORTS / "operating_points.json"
RESULTS = REPORTS / "results.json"
EXPLANATIONS = REPORTS / "explanations.json"
EMBEDDING = REPORTS / "embedding.parquet"
REPORT = REPORTS / "index.html"
MODEL_CARD = REPORTS / "model_card.md"
FIGURES = REPORTS / "figures"
MEDMNIST = REPORTS / "medmnist"
CURVES = REPORTS / "curves"
PROMOTION = REPORTS / "promotion.json"
PROMOTION_PAGE = REPORTS / "promotion.html"
