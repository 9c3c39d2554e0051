"""The portable kernels, in Triton: one source for NVIDIA and AMD GPUs and, through the interpreter, for the CPU."""
