"""The training loop that `swin-unetr train` and `pretrain` share, and the task of segmentation."""
