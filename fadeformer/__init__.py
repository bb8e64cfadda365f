"""FadeFormer: medical-image classifiers that can be trained again, checked and trusted."""
