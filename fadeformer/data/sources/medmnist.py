"""MedMNIST v2 and MedMNIST+ (Yang et al. 2023, Sci Data 10:41): the twelve 2D data sets at four image sizes.

Metadata are from `medmnist/info.py` 3.0.2; the files are published at https://doi.org/10.5281/zenodo.10519652.
"""

from __future__ import annotations

from typing import NamedTuple

from fadeformer.data.dataset_card import SPLITS, DatasetCard
from fadeformer.data.download.download import RemoteFile

BASE_URL = "https://zenodo.org/records/10519652/files"
LATERALIZED = ("organamnist", "organcmnist")  # axial and coronal: left and right organs are different classes

NOTES = {  # caveats for interpreting scores, shown in the model card and report
    "chestmnist": "The split is CheXNet's 70/10/20, not NIH's official split: scores on the two cannot be compared."
    " Predicting no finding for every image has an accuracy of 0.9474.",
    "dermamnist": "Split by image, not by lesion: some of the 7,470 lesions in 10,015 images are in two splits"
    " (arXiv:2401.14497). All images are also in ISIC 2019.",
    "octmnist": "The 1,000 test images are class-balanced, the training images are not.",
    "pathmnist": "The test images come from a different clinical center than train and val.",
    "pneumoniamnist": "Val was drawn from train by image, not by patient, so val scores are optimistic.",
    "retinamnist": "Val has only 120 images, so model selection on it is noisy.",
    "breastmnist": "Label 1 is normal or benign, label 0 malignant. With 156 test images the confidence interval of an"
    " AUC is about 0.1 wide.",
    "tissuemnist": "The source images have 32 x 32 pixels: sizes 64 and above are upsampled.",
}


class DatasetInfo(NamedTuple):
    """Metadata of one data set: task, channels, image counts (train, val, test), license, class names, MD5 by size."""

    task: str
    channels: int
    counts: tuple[int, int, int]
    license: str
    classes: tuple[str, ...]
    md5: dict[int, str]


def remote_file(name: str, size: int) -> RemoteFile:
    """Return the archive of a data set, given its MedMNIST flag and the image side in pixels."""
    file = f"{name}.npz" if size == 28 else f"{name}_{size}.npz"
    return RemoteFile(f"{BASE_URL}/{file}?download=1", file, ("md5", DATASETS[name].md5[size]))


def build_card(name: str, size: int, sha256: str) -> DatasetCard:
    """Build the dataset card.

    Args:
        name: MedMNIST flag.
        size: image side in pixels.
        sha256: checksum of the archive.
    """
    info = DATASETS[name]
    return DatasetCard(
        name=name,
        file=remote_file(name, size).name,
        sha256=sha256,
        task=info.task,
        classes=info.classes,
        size=size,
        channels=info.channels,
        counts=dict(zip(SPLITS, info.counts, strict=True)),
        license=info.license,
        note=NOTES.get(name, ""),
        mirrors=name not in LATERALIZED,
    )


# fmt: off
DATASETS: dict[str, DatasetInfo] = {
    "pathmnist": DatasetInfo(
        "multi-class", 3, (89996, 10004, 7180), "CC BY 4.0",
        ("adipose", "background", "debris", "lymphocytes", "mucus", "smooth muscle", "normal colon mucosa",
         "cancer-associated stroma", "colorectal adenocarcinoma epithelium",),
        {28: "a8b06965200029087d5bd730944a56c1", 64: "55aa9c1e0525abe5a6b9d8343a507616",
         128: "ac42d08fb904d92c244187169d1fd1d9", 224: "2c51a510bcdc9cf8ddb2af93af1eadec"},
    ),
    "chestmnist": DatasetInfo(
        "multi-label, binary-class", 1, (78468, 11219, 22433), "CC BY 4.0",
        ("atelectasis", "cardiomegaly", "effusion", "infiltration", "mass", "nodule", "pneumonia", "pneumothorax",
         "consolidation", "edema", "emphysema", "fibrosis", "pleural", "hernia",),
        {28: "02c8a6516a18b556561a56cbdd36c4a8", 64: "9de6cd0b934ebb5b7426cfba5efbae16",
         128: "db107e5590b27930b62dbaf558aebee3", 224: "45bd33e6f06c3e8cdb481c74a89152aa"},
    ),
    "dermamnist": DatasetInfo(
        "multi-class", 3, (7007, 1003, 2005), "CC BY-NC 4.0",
        ("actinic keratoses and intraepithelial carcinoma", "basal cell carcinoma", "benign keratosis-like lesions",
         "dermatofibroma", "melanoma", "melanocytic nevi", "vascular lesions",),
        {28: "0744692d530f8e62ec473284d019b0c7", 64: "b70a2f5635c6199aeaa28c31d7202e1f",
         128: "2defd784463fa5243564e855ed717de1", 224: "8974907d8e169bef5f5b96bc506ae45d"},
    ),
    "octmnist": DatasetInfo(
        "multi-class", 1, (97477, 10832, 1000), "CC BY 4.0",
        ("choroidal neovascularization", "diabetic macular edema", "drusen", "normal",),
        {28: "c68d92d5b585d8d81f7112f81e2d0842", 64: "e229e9440236b774d9f0dfef9d07bdaf",
         128: "0a97e76651ace45c5d943ee3f65b63ae", 224: "abc493b6d529d5de7569faaef2773ba3"},
    ),
    "pneumoniamnist": DatasetInfo(
        "binary-class", 1, (4708, 524, 624), "CC BY 4.0",
        ("normal", "pneumonia",),
        {28: "28209eda62fecd6e6a2d98b1501bb15f", 64: "8f4eceb4ccffa70c672198ea285246c6",
         128: "05b46931834c231683c68f40c47b2971", 224: "d6a3c71de1b945ea11211b03746c1fe1"},
    ),
    "retinamnist": DatasetInfo(
        "ordinal-regression", 3, (1080, 120, 400), "CC BY 4.0",
        ("0", "1", "2", "3", "4",),
        {28: "bd4c0672f1bba3e3a89f0e4e876791e4", 64: "afda852cc34dcda56f86ad2b2457dbcc",
         128: "e48e916a24454daf90583d4e6efb1a18", 224: "eae7e3b6f3fcbda4ae613ebdcbe35348"},
    ),
    "breastmnist": DatasetInfo(
        "binary-class", 1, (546, 78, 156), "CC BY 4.0",
        ("malignant", "normal, benign",),
        {28: "750601b1f35ba3300ea97c75c52ff8f6", 64: "742edef2a1fd1524b2efff4bd7ba9364",
         128: "363e4b3f8d712e9b5de15470a2aaadf1", 224: "b56378a6eefa9fed602bb16d192d4c8b"},
    ),
    "bloodmnist": DatasetInfo(
        "multi-class", 3, (11959, 1712, 3421), "CC BY 4.0",
        ("basophil", "eosinophil", "erythroblast",
         "immature granulocytes(myelocytes, metamyelocytes and promyelocytes)", "lymphocyte", "monocyte", "neutrophil",
         "platelet",),
        {28: "7053d0359d879ad8a5505303e11de1dc", 64: "2b94928a2ae4916078ca51e05b6b800b",
         128: "adace1e0ed228fccda1f39692059dd4c", 224: "b718ff6835fcbdb22ba9eacccd7b2601"},
    ),
    "tissuemnist": DatasetInfo(
        "multi-class", 1, (165466, 23640, 47280), "CC BY 4.0",
        ("Collecting Duct, Connecting Tubule", "Distal Convoluted Tubule", "Glomerular endothelial cells",
         "Interstitial endothelial cells", "Leukocytes", "Podocytes", "Proximal Tubule Segments",
         "Thick Ascending Limb",),
        {28: "ebe78ee8b05294063de985d821c1c34b", 64: "123ece2eba09d0aa5d698fda57103344",
         128: "61b955355d7425a89687b06cca3ce0c2", 224: "b077128c4a949f0a4eb01517f9037b9c"},
    ),
    "organamnist": DatasetInfo(
        "multi-class", 1, (34561, 6491, 17778), "CC BY 4.0",
        ("bladder", "femur-left", "femur-right", "heart", "kidney-left", "kidney-right", "liver", "lung-left",
         "lung-right", "pancreas", "spleen",),
        {28: "68e3f8846a6bd62f0c9bf841c0d9eacc", 64: "2dcccc29b88e6da5a01161ef20cda288",
         128: "eeae80d0a227a8d099027e1b3cfd3b60", 224: "50747347e05c87dd3aaf92c49f9f3170"},
    ),
    "organcmnist": DatasetInfo(
        "multi-class", 1, (12975, 2392, 8216), "CC BY 4.0",
        ("bladder", "femur-left", "femur-right", "heart", "kidney-left", "kidney-right", "liver", "lung-left",
         "lung-right", "pancreas", "spleen",),
        {28: "b9ceb9546e10131b32923c5bbeaea2b1", 64: "3ce34a8724ea6f548e6db4744d03b6a9",
         128: "773c1f009daa3fe5d9a2a201b2a7ed94", 224: "050f5e875dc056f6768abf94ec9995d1"},
    ),
    "organsmnist": DatasetInfo(
        "multi-class", 1, (13932, 2452, 8827), "CC BY 4.0",
        ("bladder", "femur-left", "femur-right", "heart", "kidney-left", "kidney-right", "liver", "lung-left",
         "lung-right", "pancreas", "spleen",),
        {28: "9ab87b696fb54e2a387ebe992d6ed5f1", 64: "53a6d115339d874c25e309a994ff46d3",
         128: "ded0c5fa01a95dc4978b956f613e9b8e", 224: "b354719e553fbbb2513d5533f52a4cb1"},
    ),
}
# fmt: on
