"""One forward and backward of one form, for a profiler to start: python -m tools.gpu.probe WIDTH SIDE."""

import sys

import torch

from tools.gpu.kernels import Form, both_ways, make_inputs

if __name__ == "__main__":
    width, side = map(int, sys.argv[1:3])
    inputs = make_inputs(Form(width, side, 1), 128, torch.bfloat16, torch.device("cuda"))
    both_ways("triton", inputs)
    torch.cuda.synchronize()
