"""Ops whose tensors are spread over the processes of a torch.distributed group."""
