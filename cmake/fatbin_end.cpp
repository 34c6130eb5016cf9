// Ends a run of fat binaries: the emulated CUDA runtime takes neighbours for one, and the last wins.
__asm__(".pushsection .nv_fatbin, \"a\"\n.quad 0\n.popsection");
