"""FadeFormer: reproducible training and evaluation of medical image classifiers."""
