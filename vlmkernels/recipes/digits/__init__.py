"""A small Qwen2-VL that reads scanned digits: the recipe that made it, and the demo."""
