"""DICOM decoding: pixel pipeline, codecs and de-identified metadata."""
