// What the kernels' headers expect of a CUDA compiler, for a host compiler.
#pragma once
#define HOST_DEVICE inline
#define DEVICE inline
#define CONSTEXPR inline  // the shape is no constant there

inline int MUTANT = 0;  // the number of a deliberate mistake, for the tests of the emulator itself
