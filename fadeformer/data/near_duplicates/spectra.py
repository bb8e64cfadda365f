"""Image descriptors that rotation, reflection, shifts, contrast and inversion hardly change.

The magnitude of the Fourier spectrum is independent of shifts, contrast and inversion. On a polar grid a rotation of
the image shifts it along the angle, and a reflection reverses the angle, so that the magnitude of a second Fourier
transform along the angle is independent of both (the Fourier-Mellin transform without scale; Reddy and Chatterji 1996,
"An FFT-based technique for translation, rotation, and scale-invariant image registration").
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

SIDE = 32  # pixels of the compared images
PADDED_SIDE = 64  # zero padding before the Fourier transform, for interpolation on the polar grid
ANGLES = 32  # over half a turn; the magnitude of a real image repeats after it
RADII = np.geomspace(1.2, 11, 10)  # cycles per image
HARMONICS = 7  # of the magnitude along the angle
NOISE_FLOOR = 0.1  # added to the magnitude before the logarithm
WINDOW_POWER = 3  # of the cosine window
MARGIN = 3  # pixels of edge padding; maximum shift of the window


@cache
def window() -> Floats:
    """Circular cosine window that suppresses the corners, which rotations and shifts replace, (SIDE, SIDE)."""
    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    radius = np.hypot(y, x) / SIDE
    return np.where(radius < 0.5, np.cos(np.pi * radius) ** WINDOW_POWER, 0).astype(np.float32)


def shift_window(images: Floats, shift: tuple[int, int]) -> Floats:
    """Return the images as seen by a window shifted by (down, right) pixels; edges are replicated, (n, SIDE, SIDE)."""
    padded = np.pad(images, ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN)), mode="edge")
    top, left = MARGIN + shift[0], MARGIN + shift[1]
    return padded[:, top : top + SIDE, left : left + SIDE]


def remove_mean(images: Floats) -> Floats:
    """Subtract the mean under the window and apply the window, (n, SIDE, SIDE)."""
    weights = window()
    return np.asarray((images - (images * weights).sum((1, 2), keepdims=True) / weights.sum()) * weights)


def polar_spectra(images: Floats) -> Floats:
    """Logarithmic magnitude of the Fourier transform on a polar grid, (n, radii, angles)."""
    centered = remove_mean(images)
    centered = centered / (np.sqrt((centered**2).sum((1, 2), keepdims=True)) + 1e-6)
    magnitude = np.abs(np.fft.fft2(centered, s=(PADDED_SIDE, PADDED_SIDE))).astype(np.float32)
    magnitude = np.fft.fftshift(magnitude, axes=(1, 2))
    angles = np.arange(ANGLES) * np.pi / ANGLES
    y, x = (np.outer(RADII, function(angles)) * PADDED_SIDE / SIDE + PADDED_SIDE / 2 for function in (np.sin, np.cos))
    row, column = np.floor(y).astype(int), np.floor(x).astype(int)
    dy, dx = (y - row).astype(np.float32), (x - column).astype(np.float32)
    top = magnitude[:, row, column] * (1 - dx) + magnitude[:, row, column + 1] * dx
    bottom = magnitude[:, row + 1, column] * (1 - dx) + magnitude[:, row + 1, column + 1] * dx
    return np.asarray(np.log(top * (1 - dy) + bottom * dy + NOISE_FLOOR))


def rotation_invariants(spectra: Floats) -> Floats:
    """Mean and harmonics of the spectrum along the angle, which rotations and reflections keep, (n, features)."""
    harmonics = np.abs(np.fft.rfft(spectra, axis=2))[:, :, :HARMONICS] / ANGLES
    harmonics[:, :, 0] = spectra.mean(axis=2)
    return harmonics.reshape(len(spectra), -1).astype(np.float32)


def angular_transform(spectra: Floats, scale: Floats) -> NDArray[np.complex64]:
    """Fourier transform along the angle of the normalized spectra, for `correlate_angles`, (n, radii, frequencies).

    Args:
        spectra: (n, radii, angles).
        scale: standard deviation of the spectra at each radius, (radii, 1).
    """
    centered = (spectra - spectra.mean(axis=2, keepdims=True)) / scale
    centered = centered / (np.sqrt((centered**2).sum((1, 2), keepdims=True)) + 1e-6)
    return np.fft.rfft(centered, axis=2).astype(np.complex64)


def correlate_angles(
    first: NDArray[np.complex64], second: NDArray[np.complex64]
) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """Find the rotation, after a reflection or without one, at which two spectra correlate best.

    Args:
        first: from `angular_transform`, (n, radii, frequencies).
        second: the same of the other images.

    Returns:
        Correlation, -1 to 1; angle in radians, up to half a turn; and whether there is a reflection; each (n,).
    """
    rotated = np.fft.irfft((first * second.conj()).sum(axis=1), ANGLES, axis=1)
    reflected = np.fft.irfft((first.conj() * second.conj()).sum(axis=1), ANGLES, axis=1)
    is_reflected = reflected.max(axis=1) > rotated.max(axis=1)
    best = np.where(is_reflected[:, None], reflected, rotated)
    angle = best.argmax(axis=1) * np.pi / ANGLES
    return best.max(axis=1).astype(np.float32), angle.astype(np.float32), is_reflected
