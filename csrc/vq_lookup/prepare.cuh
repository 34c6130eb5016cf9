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
    static constexpr int kTileCodes = 128, kChunk = 64;  // columns that are loaded together
    static constexpr int kChunkBytes = kTileCodes * kChunk * 2;
    static constexpr int kSplitDim = 32;
    using Layout = TileLayout<kChunk>;  // and, what is the same, wgmma's 128-byte swizzle

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
        shift = half_norms + num_tiles * kTileCodes;
        tiles = reinterpret_cast<VqTile*>(shift + dim);
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

__device__ inline float warp_max(float x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
}

// 8 elements of a row from `column` on, zeros beyond its end. vectors: rows start at 16 bytes and
// have a multiple of 8 elements.
template <class T>
__device__ void load_eight(const T* row, int column, int dim, bool vectors, float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = 0.0f;
    if (vectors) {
        if (column < dim) load(row + column, x);
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (column + i < dim) x[i] = to_float(row[column + i]);
    }
}
inline constexpr int kVqAtOnce = 4;  // such loads, by each of eight lanes

// kBlocks times 8 elements, 64 apart from column + lane * 8 on: all on their way at once.
template <int kBlocks, class T>
__device__ void load_blocks(const T* row, int column, int dim, bool vectors, int lane,
                            float (&x)[kBlocks][8]) {
    if (vectors) {
#pragma unroll
        for (int j = 0; j < kBlocks; ++j)
            load_eight(row, column + j * 64 + lane * 8, dim, true, x[j]);
    } else {
#pragma unroll
        for (int j = 0; j < kBlocks; ++j)
            load_eight(row, column + j * 64 + lane * 8, dim, false, x[j]);
    }
}

template <class T>
__device__ void store_eight(T* row, int column, int dim, bool vectors, const float (&x)[8]) {
    if (vectors) {
        if (column < dim) store(row + column, x);
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (column + i < dim) row[column + i] = from_float<T>(x[i]);
    }
}

// Column `column` of a prepared row whose operands are split; element(i): element i, scaled.
template <bool kToken, class Element>
__device__ __half split_column(int column, int dim, Element&& element) {
    const int group = column / dim;
    if (group >= 3) return __float2half_rn(0.0f);
    const float x = element(column - group * dim);
    const __half hi = __float2half_rn(x);
    return group == (kToken ? 1 : 2) ? __float2half_rn(x - __half2float(hi)) : hi;
}

// Eight lanes share a row.
struct VqGroup {
    static constexpr int kLanes = 8;

    template <class X, class Combine>
    __device__ static X combine(X x, Combine&& f) {
#pragma unroll
        for (int offset = kLanes / 2; offset > 0; offset /= 2)
            x = f(x, __shfl_xor_sync(0xffffffffu, x, offset));
        return x;
    }
    template <class X>
    __device__ static X sum(X x) {
        return combine(x, [](X a, X b) { return a + b; });
    }
    __device__ static float max(float x) {
        return combine(x, [](float a, float b) { return fmaxf(a, b); });
    }
    __device__ static bool all(bool x) {
        return combine(int(x), [](int a, int b) { return a & b; });
    }
};

template <class T>
struct VqCodebook {
    const T* data;  // [num_codes, dim]
    int num_codes, dim;
    bool cosine, vectors;
    // Scaled 16-bit elements are exact in fp16: no shift.
    static constexpr bool kExact = sizeof(T) == 2;
    __device__ bool shifted() const { return !cosine && !kExact; }
    __device__ const T* row(int code) const { return data + int64_t(code) * dim; }
};

// The mean of up to 16 valid codes, spread over the codebook: any shift is right, this one takes
// away what all have in common. Every CTA computes the same one.
template <class T>
__device__ float vq_shift(const VqCodebook<T>& codebook, int column) {
    constexpr int kCount = 16;
    if (!codebook.shifted()) return 0;
    float sum = 0;
    int valid = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        const float x =
            to_float(codebook.row(int(int64_t(codebook.num_codes) * i / kCount))[column]);
        if (vq_valid(x)) sum += x, ++valid;
    }
    return valid ? sum / float(valid) : 0.0f;
}

// What a code is multiplied by (besides the tile's scale), and its length squared after that.
struct VqCode {
    float factor;   // 0: a code without a direction
    double square;  // infinite: not valid
    float largest;  // element

    template <class T>
    __device__ static VqCode of(const VqCodebook<T>& codebook, int code, const float* shift,
                                int lane) {
        VqCode result{1.0f, 0, 0.0f};
        bool valid = code < codebook.num_codes;
        for (int column = lane * 8; code < codebook.num_codes && column < codebook.dim;
             column += 64) {
            float x[8];
            load_eight(codebook.row(code), column, codebook.dim, codebook.vectors, x);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                valid = valid && vq_valid(x[i]);
                const float y = column + i < codebook.dim ? x[i] - shift[column + i] : 0.0f;
                result.largest = fmaxf(result.largest, fabsf(y));
                result.square += double(y) * y;
            }
        }
        result.square = VqGroup::sum(result.square);
        result.largest = VqGroup::max(result.largest);
        if (codebook.cosine) {
            const bool zero = result.square < kVqShortest * kVqShortest;
            result.factor = zero ? 0.0f : float(rsqrt(result.square));
            result.square = zero ? 0 : 1;
        }
        result.largest *= result.factor;
        if (!VqGroup::all(valid)) result = {0.0f, INFINITY, 0.0f};
        return result;
    }
};

// A CTA prepares one tile, eight lanes a code.
template <class T>
__global__ void __launch_bounds__(VqPrepared::kTileCodes* VqGroup::kLanes)
    vq_prepare_kernel(const VqCodebook<T> codebook, const VqPrepared prepared) {
    constexpr int kCodes = VqPrepared::kTileCodes, kThreads = kCodes * VqGroup::kLanes;
    extern __shared__ __align__(16) float shift[];  // [dim]
    __shared__ float largest_of_warp[kThreads / 32], square_of_warp[kThreads / 32];
    const int thread = threadIdx.x, tile = blockIdx.x, lane = thread % VqGroup::kLanes;
    const int row = thread / VqGroup::kLanes, index = tile * kCodes + row;
    for (int i = thread; i < codebook.dim; i += kThreads) {
        shift[i] = vq_shift(codebook, i);
        if (tile == 0) prepared.shift[i] = shift[i];
    }
    __syncthreads();
    const VqCode code = VqCode::of(codebook, index, shift, lane);
    const bool valid = code.square < INFINITY;
    const float largest = warp_max(code.largest);
    const float square = warp_max(valid ? float(code.square) : 0.0f);
    if (thread % 32 == 0) {
        largest_of_warp[thread / 32] = largest;
        square_of_warp[thread / 32] = square;
    }
    __syncthreads();
    const float scale = vq_scale(warp_max(largest_of_warp[thread % 32]));
    const float norm = sqrtf(warp_max(square_of_warp[thread % 32])) * scale * 1.0001f;
    auto* out = reinterpret_cast<unsigned char*>(prepared.codes) +
                int64_t(tile) * prepared.num_chunks * VqPrepared::kChunkBytes;
    const int columns = prepared.num_chunks * VqPrepared::kChunk;
    for (int column = lane * 8; column < columns; column += 64) {
        float x[8] = {};
        if (!prepared.split && code.factor != 0)
            load_eight(codebook.row(index), column, codebook.dim, codebook.vectors, x);
        auto element = [&](int i) {
            if (code.factor == 0) return 0.0f;
            return (to_float(codebook.row(index)[i]) - shift[i]) * code.factor * scale;
        };
        Vector<__half, 8> eight;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float y = column + i < codebook.dim ? x[i] - shift[column + i] : 0.0f;
            eight.x[i] = prepared.split
                             ? split_column<false>(column + i, codebook.dim, element)
                             : __float2half_rn(code.factor == 0 ? 0 : y * code.factor * scale);
        }
        *reinterpret_cast<Vector<__half, 8>*>(
            out + column / VqPrepared::kChunk * VqPrepared::kChunkBytes +
            VqPrepared::Layout::offset(row, column % VqPrepared::kChunk / 8)) = eight;
    }
    if (lane == 0)
        prepared.half_norms[index] =
            codebook.cosine && valid ? 0.0f : float(code.square * scale * scale * 0.5);
    if (thread == 0)
        prepared.tiles[tile] = error_bound(scale, norm, columns, prepared.split,
                                           VqCodebook<T>::kExact && !codebook.cosine);
}

}  // namespace vlmkernels
