// Of a token's candidates the nearest in float64; among equally near ones that of lowest index.
#pragma once

#include "vq_lookup/candidates.cuh"

namespace vlmkernels {

// Squared distance, or 1 - similarity; infinite for a code that isn't valid.
template <class T>
__device__ double vq_distance(const VqCodebook<T>& codebook, const T* token, const T* code, int dim,
                              int lane) {
    double dot = 0, square = 0, token_square = 0;
    bool valid = true;
    for (int column = 0; column < dim; column += kVqAtOnce * 64) {
        float x[kVqAtOnce][8], y[kVqAtOnce][8];
        load_blocks(code, column, dim, codebook.vectors, lane, y);
        load_blocks(token, column, dim, codebook.vectors, lane, x);
#pragma unroll
        for (int i = 0; i < kVqAtOnce * 8; ++i) {
            if (column + i / 8 * 64 >= dim) break;
            const float a = x[i / 8][i % 8], b = y[i / 8][i % 8];
            valid &= vq_valid(b);
            if (codebook.cosine) {
                dot += double(a) * b;
                token_square += double(a) * a;
                square += double(b) * b;
            } else {
                square += (double(a) - b) * (double(a) - b);
            }
        }
    }
    square = VqGroup::sum(valid ? square : INFINITY);
    if (!codebook.cosine) return square;
    dot = VqGroup::sum(dot);
    token_square = VqGroup::sum(token_square);
    if (!(square < INFINITY)) return square;
    constexpr double kLeast = kVqShortest * kVqShortest;
    if (square < kLeast || token_square < kLeast) return 1;
    return 1 - dot / (sqrt(square) * sqrt(token_square));
}

// Writes the results of token `row` of the warp, token `token` of all. Called by whole warps.
template <class T, class Candidates>
__device__ void vq_rerank(const VqLookupParams& p, const VqCodebook<T>& codebook,
                          const typename Candidates::Shared& shared, int row, int64_t token,
                          int lane) {
    const bool there = token < p.num_tokens;
    const T* z = static_cast<const T*>(p.z) + (there ? token * p.dim : 0);
    const int count = there ? shared.count[row] : 0;
    const bool every = count > Candidates::kMost;
    double best = INFINITY;
    int nearest = -1;
    const int own_count = count >= Candidates::kInvalid ? 0 : every ? p.num_codes : count;
    const int rounds = __reduce_max_sync(0xffffffffu, own_count);
    for (int i = 0; i < rounds; ++i) {
        const bool own = i < own_count;
        const int code = !own ? 0 : every ? i : shared.list[row][i].code;
        const double distance = vq_distance(codebook, z, codebook.row(code), own ? p.dim : 0, lane);
        if (own && (distance < best || (distance == best && code < nearest))) {
            best = distance;
            nearest = code;
        }
    }
    if (!there) return;
    const int index = nearest < 0 ? 0 : nearest;
    if (lane == 0) {
        p.indices[token] = index;
        p.distance[token] = nearest < 0 ? NAN : float(best);
    }
    T* to = static_cast<T*>(p.quantized) + token * p.dim;
    for (int column = 0; column < p.dim; column += kVqAtOnce * 64) {
        float x[kVqAtOnce][8];  // and back: exact
        load_blocks(codebook.row(index), column, p.dim, codebook.vectors, lane, x);
#pragma unroll
        for (int j = 0; j < kVqAtOnce; ++j)
            store_eight(to, column + j * 64 + lane * 8, p.dim, codebook.vectors, x[j]);
    }
}

}  // namespace vlmkernels
