"""The demo: a small Qwen3-VL learns to watch a small game, on the CPU and in a few minutes (`make demo`)."""
