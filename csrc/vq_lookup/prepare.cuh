// The codebook as the tensor cores take it: tiles of kTileCodes codes in fp16, in the order of
// shared memory, scaled by a power of two of the tile's own so that the largest element uses the
// whole range. Less a common shift (Euclidean), or each at length 1 (cosine).
#pragma once

#include <cuda_runtime.h>

#include "common/mma.cuh"
#include "common/vector.cuh"
#include "vq_lookup/vq_lookup.h"

namespace vlmkernels {

struct VqTile {
    float scale;          // power of two: the tile's codes are multiplied by it
    float inverse_scale;  //
    // A score, in units of scale(token) * scale(tile), is wrong by at most
    //   per_norm * |token| + constant + per_scale * scale(token).
    float per_norm, constant, per_scale;
};

// What the workspace holds.
struct VqPrepared {
    static constexpr int kTileCodes = 128, kChunk = 32;  // columns that are loaded together
    static constexpr int kChunkBytes = kTileCodes * kChunk * 2;
    static constexpr int kSplitDim = 32;
    using Layout = TileLayout<kChunk>;

    __half* codes;      // [num_tiles, num_chunks, kTileCodes, kChunk], chunks of 8 permuted
    float* half_norms;  // [num_tiles, kTileCodes]: |e|^2 / 2 in units of the scale squared; inf:
                        // not valid
    VqTile* tiles;      // [num_tiles]
    float* shift;       // [dim]
    int num_tiles, num_chunks;
    bool split;  // operands as hi + lo, in three groups of columns: hi hi, lo hi, hi lo

    // Narrow rows are split: their scores lie close together, and columns are to spare.
    static int columns(int dim) { return dim <= kSplitDim ? 3 * dim : dim; }
    static int64_t bytes(int num_codes, int dim) {
        const int64_t tiles = (num_codes + kTileCodes - 1) / kTileCodes;
        const int64_t chunks = (columns(dim) + kChunk - 1) / kChunk;
        return tiles * (chunks * kChunkBytes + kTileCodes * 4 + int64_t(sizeof(VqTile))) + dim * 4;
    }
    VqPrepared(void* workspace, int num_codes, int dim)
        : num_tiles((num_codes + kTileCodes - 1) / kTileCodes),
          num_chunks((columns(dim) + kChunk - 1) / kChunk),
          split(dim <= kSplitDim) {
        codes = static_cast<__half*>(workspace);
        half_norms =
            reinterpret_cast<float*>(codes + int64_t(num_tiles) * num_chunks * kTileCodes * kChunk);
        tiles = reinterpret_cast<VqTile*>(half_norms + num_tiles * kTileCodes);
        shift = reinterpret_cast<float*>(tiles + num_tiles);
    }
};

__device__ inline bool vq_valid(float x) { return fabsf(x) < kVqLargest; }  // NaN is not

// 2^14 / |largest| rounded to a power of two, at most 2^40: fp16 then holds the elements, the
// largest with 11 bits, and the others wrong by at most 2^-11 of themselves or 2^-25.
__device__ inline float vq_scale(float largest) {
    const int exponent = int(__float_as_uint(largest) >> 23) - 127;
    return __uint_as_float(uint32_t(min(14 - exponent, 40) + 127) << 23);
}

// Bound of the error of a score (see vq_lookup.h), with norms in scaled units:
//   operands   both off by u = 2^-11 of themselves, or by 2^-25: (2u + u^2) |z||e| + 2^-20
//   (|z|+|e|)
//              as sqrt(dim) <= 32. Split ones leave lo lo out and round lo: 4 u^2 instead of 2u.
//              16-bit inputs without a shift are exact but for the 2^-25.
//   shift      z and e minus the shift, rounded; a code at length 1: 2^-22 |z||e|
//   sums       a tensor core adds groups of 4 products or more with an error of 2^-22 of their sum
//   of
//              magnitudes: columns 2^-24 |z||e| (Fasi et al. 2021, "Numerical behavior of NVIDIA
//              tensor cores")
//   |e|^2 / 2  computed in float64: shift, two roundings: 2^-22 |e|^2 / 2
// Each is doubled or rounded up, which leaves room for the rounding of the bound itself.
__device__ inline VqTile error_bound(float scale, float norm, int columns, bool split, bool exact) {
    const float operands = exact ? 0.0f : split ? 0x1p-19f : 0x1.01p-10f;
    const float relative = operands + 0x1p-21f + float(columns) * 0x1p-23f;
    const float inverse_scale = 1.0f / scale;
    return {.scale = scale,
            .inverse_scale = inverse_scale,
            .per_norm = relative * norm + 0x1p-20f,
            .constant = 0x1p-20f * norm + 0x1p-40f,
            .per_scale = 0x1p-21f * inverse_scale * norm * norm * 0.5f};
}

// Column `column` of a prepared row, of which element(i) is element i, scaled. kFirst: of tokens.
template <bool kToken, class Element>
__device__ __half vq_column(int column, int dim, bool split, Element&& element) {
    if (!split) return __float2half_rn(column < dim ? element(column) : 0.0f);
    if (column >= 3 * dim) return __float2half_rn(0.0f);
    const int group = column / dim;
    const float x = element(column - group * dim);
    const __half hi = __float2half_rn(x);
    return group == (kToken ? 1 : 2) ? __float2half_rn(x - __half2float(hi)) : hi;
}

template <class T>
struct VqShape {
    const T* codebook;  // [num_codes, dim]
    int num_codes, dim;
    bool cosine;
    // 16-bit elements fit fp16 once scaled, so that they need no shift, nor their parts of a split.
    static constexpr bool kExact = sizeof(T) == 2;
    __device__ bool shifted() const { return !cosine && !kExact; }
};

// The mean of up to 64 valid codes, spread over the codebook: any shift is right, this one takes
// away what all have in common. Every CTA computes the same one.
template <class T>
__device__ void vq_shift(const VqShape<T>& codes, float* shift, int thread, int threads) {
    const int count = min(codes.num_codes, 64);
    for (int column = thread; column < codes.dim; column += threads) {
        float sum = 0;
        int valid = 0;
        for (int i = 0; codes.shifted() && i < count; ++i) {
            const int64_t code = int64_t(codes.num_codes) * i / count;
            const float x = to_float(codes.codebook[code * codes.dim + column]);
            if (vq_valid(x)) sum += x, ++valid;
        }
        shift[column] = valid ? sum / float(valid) : 0.0f;
    }
}

__device__ inline float warp_max(float x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
}
__device__ inline double warp_sum(double x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

// A CTA prepares one tile; a warp takes every eighth code.
template <class T>
__global__ void __launch_bounds__(256)
    vq_prepare_kernel(const VqShape<T> codes, const VqPrepared prepared) {
    constexpr int kCodes = VqPrepared::kTileCodes, kWarps = 8;
    extern __shared__ __align__(16) float shift[];  // [dim]
    __shared__ float factors[kCodes];               // to length 1, or 1; 0: a code of zeros
    __shared__ double squares[kCodes];              // infinite: not valid
    __shared__ float largest_of_warp[kWarps];
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, tile = blockIdx.x;
    vq_shift(codes, shift, thread, 256);
    __syncthreads();
    if (tile == 0)
        for (int i = thread; i < codes.dim; i += 256) prepared.shift[i] = shift[i];
    auto row = [&](int i) { return codes.codebook + int64_t(tile * kCodes + i) * codes.dim; };
    float largest = 0;
    for (int i = warp; i < kCodes; i += kWarps) {
        const bool there = tile * kCodes + i < codes.num_codes;
        float row_largest = 0;
        double square = 0;
        bool valid = there;
        for (int column = lane; there && column < codes.dim; column += 32) {
            const float x = to_float(row(i)[column]), y = x - shift[column];
            valid = valid && vq_valid(x);
            row_largest = fmaxf(row_largest, fabsf(y));
            square += double(y) * y;
        }
        valid = __all_sync(0xffffffffu, valid);
        square = warp_sum(square);
        row_largest = warp_max(row_largest);
        const bool zero = codes.cosine && square < kVqShortest * kVqShortest;
        const float factor = codes.cosine && !zero ? float(rsqrt(square)) : 1.0f;
        if (valid && !zero) largest = fmaxf(largest, row_largest * factor);
        if (lane == 0) {
            factors[i] = zero ? 0.0f : factor;
            squares[i] = !valid ? INFINITY : codes.cosine ? double(!zero) : square;
        }
    }
    if (lane == 0) largest_of_warp[warp] = largest;
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, largest_of_warp[w]);
    const float scale = vq_scale(largest);
    __half* out =
        prepared.codes + int64_t(tile) * prepared.num_chunks * kCodes * VqPrepared::kChunk;
    for (int chunk = 0; chunk < prepared.num_chunks; ++chunk)
        for (int i = thread; i < kCodes * VqPrepared::kChunk; i += 256) {
            const int code = i / VqPrepared::kChunk, in_chunk = i % VqPrepared::kChunk;
            const float factor = squares[code] < INFINITY ? factors[code] : 0.0f;
            const __half x = vq_column<false>(
                chunk * VqPrepared::kChunk + in_chunk, codes.dim, prepared.split, [&](int column) {
                    if (factor == 0) return 0.0f;
                    return (to_float(row(code)[column]) - shift[column]) * factor * scale;
                });
            const uint32_t offset =
                VqPrepared::Layout::offset(code, in_chunk / 8) + in_chunk % 8 * 2;
            out[chunk * kCodes * VqPrepared::kChunk + offset / 2] = x;
        }
    double square = 0;  // the largest
    for (int i = 0; i < kCodes; ++i)
        if (squares[i] < INFINITY) square = fmax(square, squares[i]);
    if (thread < kCodes) {
        const bool zero = codes.cosine && squares[thread] < INFINITY;
        prepared.half_norms[tile * kCodes + thread] =
            zero ? 0.0f : float(squares[thread] * scale * scale * 0.5);
    }
    if (thread == 0) {
        const bool exact = VqShape<T>::kExact && !codes.cosine;
        prepared.tiles[tile] =
            error_bound(scale, float(sqrt(square) * scale) * 1.0001f,
                        prepared.num_chunks * VqPrepared::kChunk, prepared.split, exact);
    }
}

}  // namespace vlmkernels
