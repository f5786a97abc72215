// What the kernels' headers expect of a CUDA compiler, for a host compiler.
#pragma once
#define HOST_DEVICE inline
#define DEVICE inline
