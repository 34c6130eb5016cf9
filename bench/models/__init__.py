"""Benches of whole models, one small file each: `cases(device, dtype)` as in bench/ops."""
