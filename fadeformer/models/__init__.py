"""Models: FadeNet and its layers, FadeViT, MedViT and all of timm, created by `create_model`."""

from fadeformer.models.factory import create_model, load_weights
from fadeformer.models.fade_attention import FadeAttn
from fadeformer.models.fadenet import FadeNet
from fadeformer.models.heat_diffusion import AttentionPool, DiffusionAttn
from fadeformer.models.medvit import MedViT

__all__ = ["AttentionPool", "DiffusionAttn", "FadeAttn", "FadeNet", "MedViT", "create_model", "load_weights"]
