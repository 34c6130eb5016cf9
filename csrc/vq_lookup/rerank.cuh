// Of a token's candidates the nearest in float64; among equally near ones that of lowest index.
#pragma once

#include "vq_lookup/candidates.cuh"

namespace vlmkernels {

// Eight lanes share a token; all four groups of a warp add together.
struct VqGroup {
    static constexpr int kLanes = 8;
    int lane;  // within the group

    __device__ static double sum(double x) {
#pragma unroll
        for (int offset = kLanes / 2; offset > 0; offset /= 2)
            x += __shfl_xor_sync(0xffffffffu, x, offset);
        return x;
    }
};

// Squared distance, or 1 - similarity; infinite for a code that isn't valid.
template <class T>
__device__ double vq_distance(const VqGroup& group, const T* token, const T* code, int dim,
                              bool cosine) {
    double dot = 0, square = 0, token_square = 0;
    bool valid = true;
    for (int i = group.lane; i < dim; i += VqGroup::kLanes) {
        const float x = to_float(token[i]), y = to_float(code[i]);
        valid = valid && vq_valid(y);
        if (cosine) {
            dot += double(x) * y;
            token_square += double(x) * x;
            square += double(y) * y;
        } else {
            square += (double(x) - y) * (double(x) - y);
        }
    }
    square = VqGroup::sum(valid ? square : INFINITY);
    if (!cosine) return square;
    dot = VqGroup::sum(dot);
    token_square = VqGroup::sum(token_square);
    if (!(square < INFINITY)) return square;
    constexpr double kLeast = kVqShortest * kVqShortest;
    if (square < kLeast || token_square < kLeast) return 1;
    return 1 - dot / (sqrt(square) * sqrt(token_square));
}

// Writes the results of token `row` of the warp, token `token` of all. Called by whole warps.
template <class T, class Candidates>
__device__ void vq_rerank(const VqLookupParams& p, const typename Candidates::Shared& shared,
                          const VqGroup& group, int row, int64_t token) {
    const bool there = token < p.num_tokens;
    const T* z = static_cast<const T*>(p.z) + (there ? token * p.dim : 0);
    const auto* codebook = static_cast<const T*>(p.codebook);
    const int count = there ? shared.count[row] : 0;
    const bool every = count > Candidates::kMost;
    double best = INFINITY;
    int nearest = -1;
    const int own_count = count >= Candidates::kInvalid ? 0 : every ? p.num_codes : count;
    const int rounds = __reduce_max_sync(0xffffffffu, own_count);
    for (int i = 0; i < rounds; ++i) {
        const bool own = i < own_count && (every || shared.list[row][i].upper >= shared.lower[row]);
        const int code = !own ? 0 : every ? i : shared.list[row][i].code;
        const double distance =
            vq_distance(group, z, codebook + int64_t(code) * p.dim, own ? p.dim : 0, p.cosine);
        if (own && (distance < best || (distance == best && code < nearest))) {
            best = distance;
            nearest = code;
        }
    }
    if (!there) return;
    const int index = nearest < 0 ? 0 : nearest;
    if (group.lane == 0) {
        p.indices[token] = index;
        p.distance[token] = nearest < 0 ? NAN : float(best);
    }
    const T* from = codebook + int64_t(index) * p.dim;
    T* to = static_cast<T*>(p.quantized) + token * p.dim;
    for (int i = group.lane; i < p.dim; i += VqGroup::kLanes) to[i] = from[i];
}

}  // namespace vlmkernels
