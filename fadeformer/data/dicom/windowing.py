"""Convert stored values of grayscale DICOM images to 8 bits: modality transform, then the first VOI window or LUT.

Implements DICOM PS3.3 C.11.2.1.2 (linear window) and C.11.2.1.3 (sigmoid, linear exact) with output range 0 to 255. A
file with neither LUT nor a window of finite numbers is min-max scaled over all frames together, so that brightness is
comparable between frames.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.pixels.processing import apply_modality_lut, apply_voi

StoredArray = NDArray[Any]  # integers of any width, or floats
FloatArray = NDArray[np.float64]


class WindowError(ValueError):
    """Invalid pixel values or window; the message does not quote the file."""


def to_8_bits(stored: Sequence[StoredArray], dataset: Dataset) -> tuple[NDArray[np.uint8], str]:
    """Scale all frames to 8 bits and return how: `window`, `table` (VOI LUT) or `range` (min-max).

    Padding pixels become black and do not count for the range.

    Args:
        stored: stored values of each frame, (height, width).
        dataset: elements of the file.

    Raises:
        WindowError: a window or a pixel value is invalid. pydicom raises other exceptions on corrupt files.
    """
    frames = np.empty((len(stored), *stored[0].shape), np.uint8)
    scales = [_display_transform(dataset, _voi_dataset(dataset, number)) for number in range(len(stored))]
    names = {name for name, _ in scales}
    low, high = _value_range(stored, dataset) if "range" in names else (0.0, 0.0)
    for number, (frame, (_, to_unit)) in enumerate(zip(stored, scales, strict=True)):
        values = _modality_values(frame, dataset, number)
        if to_unit is None:
            units = np.clip((values - low) / (high - low), 0, 1) if high > low else np.zeros(values.shape)
        else:
            units = to_unit(values)
        if dataset.PhotometricInterpretation == "MONOCHROME1":
            units = 1 - units
        units[_padding_mask(frame, dataset)] = 0
        frames[number] = np.floor(units * 255 + 0.5)
    return frames, "/".join(sorted(names))


def _display_transform(dataset: Dataset, display: Dataset) -> tuple[str, Callable[[FloatArray], FloatArray] | None]:
    """Scaling name of a frame and the function from modality values to [0, 1]; None for min-max scaling."""
    if dataset.get("VOILUTSequence"):
        max_value = 2 ** dataset.VOILUTSequence[0].LUTDescriptor[2] - 1
        # Integers, because pydicom truncates floats with a warning.
        return "table", lambda values: apply_voi(np.floor(values).astype(np.int64), dataset) / max_value
    center, width = (_first_value(display.get(keyword)) for keyword in ("WindowCenter", "WindowWidth"))
    if center is None or width is None:
        return "range", None
    function = str(display.get("VOILUTFunction") or "LINEAR").upper()
    if function == "LINEAR" and width >= 1:
        return "window", lambda values: _linear_window(values, center - 0.5, width - 1)
    if function == "LINEAR_EXACT" and width > 0:
        return "window", lambda values: _linear_window(values, center, width)
    if function == "SIGMOID" and width > 0:
        # exp() overflows above 700; the result is 0 or 1 long before.
        return "window", lambda values: 1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -700, 700)))
    raise WindowError("has a window of zero width or with an unknown function; export it again")


def _linear_window(values: FloatArray, center: float, width: float) -> FloatArray:
    if width == 0:
        return (values > center).astype(np.float64)
    return np.clip((values - center) / width + 0.5, 0, 1)


def _first_value(value: object) -> float | None:
    """First value of a multi-valued element, as the default window; None if it is empty or no finite number."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = value[0] if value else None
    try:
        number = float(str(value))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _value_range(stored: Sequence[StoredArray], dataset: Dataset) -> tuple[float, float]:
    lows, highs = [], []
    for number, frame in enumerate(stored):
        values = _modality_values(frame, dataset, number)[~_padding_mask(frame, dataset)]
        if values.size:
            lows.append(float(values.min()))
            highs.append(float(values.max()))
    return (min(lows), max(highs)) if lows else (0.0, 0.0)


def _modality_values(frame: StoredArray, dataset: Dataset, number: int) -> FloatArray:
    """Apply the modality LUT or rescale: values in physical units, such as Hounsfield units."""
    if dataset.get("ModalityLUTSequence"):
        values = apply_modality_lut(frame, dataset).astype(np.float64)
    else:
        values = frame.astype(np.float64)
        rescale = _functional_group(dataset, number, "PixelValueTransformationSequence", "RescaleSlope")
        if rescale.get("RescaleSlope") is not None and rescale.get("RescaleIntercept") is not None:
            values = values * float(rescale.RescaleSlope) + float(rescale.RescaleIntercept)
    if not np.isfinite(values).all():
        raise WindowError("has pixels that are NaN or infinite; export it again")
    return values


def _voi_dataset(dataset: Dataset, number: int) -> Dataset:
    return _functional_group(dataset, number, "FrameVOILUTSequence", "WindowCenter")


def _functional_group(dataset: Dataset, number: int, sequence: str, keyword: str) -> Dataset:
    """Dataset with an element of a frame: per-frame or shared functional group (enhanced DICOM), else the top level."""
    for groups, index in (("PerFrameFunctionalGroupsSequence", number), ("SharedFunctionalGroupsSequence", 0)):
        items = dataset.get(groups) or []
        if index < len(items) and items[index].get(sequence) and keyword in items[index][sequence][0]:
            return Dataset(items[index][sequence][0])
    return dataset


def _padding_mask(frame: StoredArray, dataset: Dataset) -> NDArray[np.bool_]:
    """Mask of padding pixels, by stored value."""
    first = dataset.get("PixelPaddingValue")
    if first is None:
        return np.zeros(frame.shape, np.bool_)
    last = dataset.get("PixelPaddingRangeLimit", first)
    low, high = sorted(_to_signed(int(value), dataset) for value in (first, last))
    return np.asarray((frame >= low) & (frame <= high))


def _to_signed(value: int, dataset: Dataset) -> int:
    """Convert a padding value to the signedness of the pixels: many files with signed pixels store it unsigned."""
    bits = int(dataset.BitsAllocated)
    return value - 2**bits if dataset.PixelRepresentation == 1 and value >= 2 ** (bits - 1) else value
