"""Where a model runs. The only layer that imports deepspeed or torch.distributed."""
