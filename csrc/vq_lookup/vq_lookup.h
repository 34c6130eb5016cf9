// vq_lookup: for each token the nearest code, exactly: the index that float64 arithmetic gives.
//   vq_lookup.h        what the kernels are given, and the launch declarations
//   prepare.cuh        the codebook as tiles of fp16, scaled, with what bounds their error
//   candidates.cuh     the codes of a token that rounding cannot rule out
//   rerank.cuh         of those, the nearest in float64
//   tokens.cuh         a block of tokens: to shared memory, and its results
//   vq_lookup_hopper.cuh  the kernel of sm_90a: scores by wgmma, candidates, rerank
//   vq_lookup.cuh      the kernel of sm_80
//   launch.cuh, instances/*.cu  launchers, one element type each
//   vq_lookup_cpu.cpp  the same method in fp32, on the CPU
//   vq_lookup_backward_cpu.cpp  the gradients, on the CPU
//   vq_lookup.cpp      argument checks and binding
//
// Why the result is exact. Nearest by Euclidean distance is largest score s = z.e - |e|^2 / 2, for
// any common shift of z and e; by cosine it is largest s = z.e / |e|. A score v is computed with
// rounded operands, and a bound b on |v - s| is known for each pair: see `error_bound` in
// prepare.cuh. Let L be the largest v - b of a token. Then the best score is at least L, so that a
// code with v + b < L is not the best one. All others are candidates, and are compared in float64.
// A token with more candidates than its list holds is compared with every code.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/launch.h"

namespace vlmkernels {

// A token or code with an element of this magnitude, infinite or NaN is not valid: such a code
// never wins; such a token gets index 0 and distance NaN.
inline constexpr float kVqLargest = 0x1p50f;
// The cosine similarity with a vector shorter than this is 0.
inline constexpr double kVqShortest = 0x1p-50;

inline constexpr int kVqMostDim = 1024;

struct VqLookupParams {
    const void* z;         // [num_tokens, dim]
    const void* codebook;  // [num_codes, dim]
    int64_t* indices;      // [num_tokens]
    void* quantized;       // [num_tokens, dim]
    float* distance;       // [num_tokens]
    void* workspace;       // CUDA: vq_lookup_workspace() bytes
    int64_t num_tokens;
    int num_codes;
    int dim;
    bool cosine;
    DType dtype;  // of z, codebook and quantized
};

// Bytes that launch_vq_lookup works in: a little more than the codebook in fp16.
int64_t vq_lookup_workspace(int num_codes, int dim);

Error launch_vq_lookup(const VqLookupParams& p, Stream stream);

template <class Isa>
void vq_lookup_cpu(const VqLookupParams& p);

// Any of the gradients may be null: it is not given, or not wanted.
struct VqBackwardParams {
    const void* z;      // [num_tokens, dim]
    const void* codes;  // [num_tokens, dim]: the code of each token
    // order[starts[c]], ..., order[starts[c + 1] - 1]: the tokens of code c.
    const int64_t *starts, *order;
    const void *to_z, *to_code;       // [num_tokens, dim]: added to the gradient of either
    const float* ddistance;           // [num_tokens]
    const float* dcodebook_distance;  // [num_tokens]
    void* dz;                         // [num_tokens, dim]
    void* dcodebook;                  // [num_codes, dim]
    int64_t num_tokens;
    int num_codes;
    int dim;
    bool cosine;
    DType dtype;  // of all but the distances
};

template <class Isa>
void vq_lookup_backward_cpu(const VqBackwardParams& p);

}  // namespace vlmkernels
