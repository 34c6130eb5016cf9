"""Benches of the rooms, a file each: `cases(device, dtype)` with stated bytes and FLOPs."""
