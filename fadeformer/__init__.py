"""FadeFormer: medical-image classifiers that can be trained again, checked and trusted."""

import os

# On processors with AMX, oneDNN's matrix products in bfloat16 read what lies behind a matrix whose inner side is no
# multiple of 32, and the result is now and then NaN (oneDNN issue 5717; seen in the training of a ResNet with 28 images
# a batch). So AMX is left alone, unless the environment says otherwise; oneDNN reads this when it first computes.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
