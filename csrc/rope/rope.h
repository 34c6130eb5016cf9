// rope: rotates pair i of each head, the elements i and i + rotary_dim/2, by an angle that all
// heads of a token share (common/rotation.h).
//   rope.h        what the kernel is given, and the launch declarations
//   rope.cu       CUDA kernel and launcher
//   rope_cpu.cpp  CPU kernel, compiled once per instruction set
//   rope.cpp      argument checks and binding
#pragma once

#include "common/launch.h"
#include "common/rotation.h"

namespace vlmkernels {

struct RopeHeads {
    const void* in;  // [batch, seqlen, num_heads, head_dim]
    void* out;       // the same; may be `in`
    int num_heads;
    HeadStrides in_strides, out_strides;
};

struct RopeParams {
    RopeHeads q, k;
    RopeHeads v;  // copied; no heads: there is none
    DType dtype;
    int num_tokens;  // batch * seqlen
    int head_dim;
    Rotation rotation;
};

Error launch_rope(const RopeParams& p, Stream stream);

template <class Isa>
void rope_cpu(const RopeParams& p);

}  // namespace vlmkernels
