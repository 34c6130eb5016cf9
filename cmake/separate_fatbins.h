// Included before every .cu of a build with an emulated runtime: eight zero bytes between the fat
// binaries of the translation units, because the emulator takes adjacent ones for a single one.
#pragma once
#if !defined(__CUDA_ARCH__)
__asm__(".pushsection .nv_fatbin, \"a\"\n.align 8\n.quad 0\n.popsection");
#endif
