"""Self-supervised pretraining of the encoder: rotation, contrast and reconstruction of views with cutout.

Source: Tang et al., "Self-Supervised Pre-Training of Swin Transformers for 3D Medical Image Analysis", CVPR 2022,
https://arxiv.org/abs/2111.14791.
"""
