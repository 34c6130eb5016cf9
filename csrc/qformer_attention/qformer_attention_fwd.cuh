// Forward. A warp owns 16 queries of one head, a CTA kWarps such rows of one image. It walks over
// blocks of kKeys tokens, and over each block twice, in slabs of kSlab columns of x:
//   scores  q' = q weight_k[:, slab] (in registers, never stored), scores += q' x[:, slab]^T
//   output  y = p x[:, slab] (in registers), out += y weight_v[:, slab]^T
// so that only the slabs of x and of the weights pass through shared memory, and the accumulators
// are kKeys and head_dim wide, whatever x's width. Between the two, the online softmax of a block.
#pragma once

#include <cuda_runtime.h>

#include "common/launch.cuh"
#include "common/mma.cuh"
#include "common/softmax.cuh"
#include "common/vector.cuh"
#include "qformer_attention/qformer_attention.h"

namespace vlmkernels {

template <class Element_, int kDim_, int kKeys_, int kWarps_ = 8>
struct QFormerTile {
    using Element = Element_;
    static constexpr int kDim = kDim_;    // head_dim, rounded up
    static constexpr int kKeys = kKeys_;  // tokens whose scores a warp holds
    static constexpr int kWarps = kWarps_, kThreads = kWarps * 32;
    static constexpr int kHeads = kWarps / 2;  // most heads of a CTA
    static constexpr int kSlab = 32, kStages = 3;
    static constexpr int kQueryBytes = kWarps * 16 * kDim * 2;
    static constexpr int kXBytes = kKeys * kSlab * 2, kWeightBytes = kDim * kSlab * 2;
    static constexpr int kStageBytes = kXBytes + kHeads * kWeightBytes;
    static constexpr int kSharedBytes = kQueryBytes + kStages * kStageBytes;
    static_assert(kKeys % 16 == 0 && kSharedBytes <= 163 * 1024, "what sm_80 has");
};

// Which rows a warp works on: tiles of 16 queries, heads one after the other.
struct QFormerRows {
    int image, head, query0, first_head, num_heads;  // of the CTA: num_heads from first_head on
    bool active;

    __device__ QFormerRows(const QFormerAttentionParams& p, int warps, int max_heads, int warp) {
        const int per_head = (p.num_queries + 15) / 16, num_tiles = per_head * p.num_heads;
        const int per_cta = tiles_per_cta(p.num_queries, warps, max_heads);
        const int ctas = (num_tiles + per_cta - 1) / per_cta;
        image = blockIdx.x / ctas;
        const int first = blockIdx.x % ctas * per_cta, last = min(first + per_cta, num_tiles) - 1;
        active = first + warp <= last;
        const int tile = active ? first + warp : last;
        head = tile / per_head;
        query0 = tile % per_head * 16;
        first_head = first / per_head;
        num_heads = last / per_head - first_head + 1;
    }
    __device__ int num_keys(const QFormerAttentionParams& p) const {
        return p.key_lengths ? max(0, min(p.key_lengths[image], p.num_tokens)) : p.num_tokens;
    }
    // Copies this warp's queries.
    template <class Tile>
    __device__ void load_queries(uint32_t tile, const QFormerAttentionParams& p, int lane) const {
        const int64_t stride = int64_t(p.num_heads) * p.head_dim;
        const auto* q = static_cast<const typename Tile::Element*>(p.q) + image * p.q_batch_size +
                        query0 * stride + head * p.head_dim;
        load_tile<16, Tile::kDim, 32>(tile, q, stride, p.num_queries - query0, p.head_dim, lane);
    }
    // As many as there are warps, unless they were of more than max_heads heads.
    __host__ __device__ static int tiles_per_cta(int num_queries, int warps, int max_heads) {
        return num_queries > 16 ? warps : warps < max_heads ? warps : max_heads;
    }
};

// Where a CTA stands: pass 0 and 1 over each block of tokens, a slab of columns at a time.
template <class Tile>
struct QFormerStep {
    int key0 = 0, column = 0;
    bool second = false;

    __device__ void advance(int width) {
        column += Tile::kSlab;
        if (column < width) return;
        column = 0;
        if (second) key0 += Tile::kKeys;
        second = !second;
    }
};

// Copies the slab of x; tokens from num_keys on become zero.
template <class Tile, int kThreads>
__device__ void load_tokens(uint32_t tile, const QFormerAttentionParams& p, int image,
                            const QFormerStep<Tile>& at, int num_keys, int thread) {
    const auto* x = static_cast<const typename Tile::Element*>(p.x) + image * p.x_batch_stride +
                    at.key0 * p.x_token_stride + at.column;
    load_tile<Tile::kKeys, Tile::kSlab, kThreads>(tile, x, p.x_token_stride, num_keys - at.key0,
                                                  p.width - at.column, thread);
}

// a = q weight_k[:, kColumns from chunk0 on], rounded
template <class Tile, int kColumns>
__device__ void project(uint32_t (&a)[kColumns / 16][4], uint32_t q, uint32_t weight, int chunk0,
                        int lane) {
    using T = typename Tile::Element;
    const FragmentLoader<Tile::kDim, Operand::kA> load_q(lane);
    const FragmentLoader<Tile::kSlab, Operand::kBTransposed> load_weight(lane);
    float projected[kColumns / 8][4] = {};
    uint32_t q_fragment[4], b[4];
#pragma unroll
    for (int k = 0; k < Tile::kDim / 16; ++k) {
        load_q(q_fragment, q, 0, k * 2);
#pragma unroll
        for (int n = 0; n < kColumns / 16; ++n) {
            load_weight(b, weight, k * 16, chunk0 + n * 2);
            mma(projected[n * 2], q_fragment, b[0], b[1], T());
            mma(projected[n * 2 + 1], q_fragment, b[2], b[3], T());
        }
    }
#pragma unroll
    for (int k = 0; k < kColumns / 16; ++k) pack_a<T>(a[k], projected[k * 2], projected[k * 2 + 1]);
}

// out += (factor y) weight_v[:, slab]^T, factor of each row
template <class Tile>
__device__ void add_output(float (&out)[1][Tile::kDim / 8][4], float (&y)[Tile::kSlab / 8][4],
                           const float (&factor)[2], uint32_t weight, int lane) {
    using T = typename Tile::Element;
    constexpr int kSlab = Tile::kSlab;
    const FragmentLoader<kSlab, Operand::kB> load_weight(lane);
    uint32_t a[kSlab / 16][4], b[4];
#pragma unroll
    for (int n = 0; n < kSlab / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) y[n][e] *= factor[e / 2];
#pragma unroll
    for (int k = 0; k < kSlab / 16; ++k) pack_a<T>(a[k], y[k * 2], y[k * 2 + 1]);
#pragma unroll
    for (int n = 0; n < Tile::kDim / 16; ++n)
#pragma unroll
        for (int k = 0; k < kSlab / 16; ++k) {
            load_weight(b, weight, n * 16, k * 2);
            mma(out[0][n * 2], a[k], b[0], b[1], T());
            mma(out[0][n * 2 + 1], a[k], b[2], b[3], T());
        }
}

// scores += a x[:, slab]^T
template <class Tile>
__device__ void add_scores(float (&scores)[1][Tile::kKeys / 8][4],
                           const uint32_t (&a)[Tile::kSlab / 16][4], uint32_t x, int lane) {
    using T = typename Tile::Element;
    const FragmentLoader<Tile::kSlab, Operand::kB> load_x(lane);
    uint32_t b[4];
#pragma unroll
    for (int n = 0; n < Tile::kKeys / 16; ++n)
#pragma unroll
        for (int k = 0; k < Tile::kSlab / 16; ++k) {
            load_x(b, x, n * 16, k * 2);
            mma(scores[0][n * 2], a[k], b[0], b[1], T());
            mma(scores[0][n * 2 + 1], a[k], b[2], b[3], T());
        }
}

// y = p x[:, slab]
template <class Tile>
__device__ void multiply_tokens(float (&y)[Tile::kSlab / 8][4],
                                const uint32_t (&p)[Tile::kKeys / 16][4], uint32_t x, int lane) {
    using T = typename Tile::Element;
    const FragmentLoader<Tile::kSlab, Operand::kBTransposed> load_x(lane);
    uint32_t b[4];
#pragma unroll
    for (int n = 0; n < Tile::kSlab / 8; ++n) y[n][0] = y[n][1] = y[n][2] = y[n][3] = 0;
#pragma unroll
    for (int k = 0; k < Tile::kKeys / 16; ++k)
#pragma unroll
        for (int n = 0; n < Tile::kSlab / 16; ++n) {
            load_x(b, x, k * 16, n * 2);
            mma(y[n * 2], p[k], b[0], b[1], T());
            mma(y[n * 2 + 1], p[k], b[2], b[3], T());
        }
}

// The online softmax of a block of tokens. out stays divided by the sum so far: y is rounded to 16
// bits, and a sum of many tokens might not fit in fp16.
template <class Tile>
struct QFormerSoftmax {
    OnlineSoftmax<1> softmax;
    float inverse[2] = {0, 0}, total[2] = {0, 0};  // of the row sums

    __device__ void operator()(uint32_t (&p)[Tile::kKeys / 16][4],
                               float (&scores)[1][Tile::kKeys / 8][4],
                               float (&out)[1][Tile::kDim / 8][4], int num_keys, float scale_log2,
                               int lane) {
        if (num_keys < Tile::kKeys)
#pragma unroll
            for (int n = 0; n < Tile::kKeys / 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    if (n * 8 + lane % 4 * 2 + e % 2 >= num_keys)
                        scores[0][n][e] = negative_infinity();
        softmax.update(scores, out, scale_log2);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float sum = quad_sum(softmax.sum[0][half]);
            inverse[half] = sum > 0 ? 1 / sum : sum;
            const float factor = total[half] * inverse[half];  // 0 before the first block
            total[half] = sum;
#pragma unroll
            for (int n = 0; n < Tile::kDim / 8; ++n)
                out[0][n][half * 2] *= factor, out[0][n][half * 2 + 1] *= factor;
        }
#pragma unroll
        for (int k = 0; k < Tile::kKeys / 16; ++k)
            pack_a<typename Tile::Element>(p[k], scores[0][k * 2], scores[0][k * 2 + 1]);
    }
};

template <class Tile>
__device__ void store_fwd(const QFormerAttentionParams& p, const QFormerRows& rows,
                          const float (&out)[1][Tile::kDim / 8][4], QFormerSoftmax<Tile>& softmax,
                          int lane) {
    using T = typename Tile::Element;
    softmax.softmax.finish();
    const T* bias = static_cast<const T*>(p.bias_v) + rows.head * p.head_dim;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int query = rows.query0 + half * 8 + lane / 4;
        if (query >= p.num_queries) continue;
        if (lane % 4 == 0)
            p.lse[(int64_t(rows.image) * p.num_heads + rows.head) * p.num_queries + query] =
                softmax.softmax.lse(0, half, p.softmax_scale);
        const bool with_bias = p.bias_v && softmax.total[half] != 0;
        T* row =
            static_cast<T*>(p.out) +
            ((int64_t(rows.image) * p.num_queries + query) * p.num_heads + rows.head) * p.head_dim;
#pragma unroll
        for (int n = 0; n < Tile::kDim / 8; ++n) {
            const int column = n * 8 + lane % 4 * 2;
            if (n * 8 >= p.head_dim) break;
            float values[2] = {out[0][n][half * 2], out[0][n][half * 2 + 1]};
            if (with_bias)
                values[0] += to_float(bias[column]), values[1] += to_float(bias[column + 1]);
            *reinterpret_cast<uint32_t*>(row + column) = pack<T>(values[0], values[1]);
        }
    }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    qformer_attention_fwd_kernel(const QFormerAttentionParams p) {
    using Element = typename Tile::Element;
    constexpr int kStages = Tile::kStages, kKeys = Tile::kKeys;
    extern __shared__ __align__(1024) unsigned char shared[];
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const QFormerRows rows(p, Tile::kWarps, Tile::kHeads, warp);
    const int num_keys = rows.num_keys(p);
    const uint32_t q = shared_address(shared) + warp * 16 * Tile::kDim * 2;
    const uint32_t stages = shared_address(shared) + Tile::kQueryBytes;
    rows.template load_queries<Tile>(q, p, lane);

    QFormerStep<Tile> at;
    // Starts the copies of the next step.
    auto load = [&](uint32_t stage) {
        if (at.key0 < num_keys) {
            const int thread = thread_in_block();
            load_tokens<Tile, Tile::kThreads>(stage, p, rows.image, at, num_keys, thread);
            const int64_t head_elements = int64_t(p.head_dim) * p.width;
            const auto* weight = static_cast<const Element*>(at.second ? p.weight_v : p.weight_k) +
                                 rows.first_head * head_elements + at.column;
            for (int i = 0; i < rows.num_heads; ++i)
                load_tile<Tile::kDim, Tile::kSlab, Tile::kThreads>(
                    stage + Tile::kXBytes + i * Tile::kWeightBytes, weight + i * head_elements,
                    p.width, p.head_dim, p.width - at.column, thread);
            at.advance(p.width);
        }
        cp_async_commit();
    };
    for (int i = 0; i < kStages - 1; ++i) load(stages + i * Tile::kStageBytes);
    int now = 0;
    // The stage of this step, when it has landed; the one that all warps left fills again.
    auto next_stage = [&] {
        cp_async_wait<kStages - 2>();
        __syncthreads();
        load(stages + (now + kStages - 1) % kStages * Tile::kStageBytes);
        const uint32_t stage = stages + now * Tile::kStageBytes;
        now = (now + 1) % kStages;
        return stage;
    };
    const int weight = Tile::kXBytes + (rows.head - rows.first_head) * Tile::kWeightBytes;

    float out[1][Tile::kDim / 8][4] = {};
    QFormerSoftmax<Tile> softmax;
    for (int key0 = 0; key0 < num_keys; key0 += kKeys) {
        float scores[1][kKeys / 8][4] = {};
        for (int column = 0; column < p.width; column += Tile::kSlab) {
            const uint32_t stage = next_stage();
            if (!rows.active) continue;
            uint32_t a[Tile::kSlab / 16][4];
            project<Tile, Tile::kSlab>(a, q, stage + weight, 0, lane);
            add_scores<Tile>(scores, a, stage, lane);
        }
        uint32_t probabilities[kKeys / 16][4];
        softmax(probabilities, scores, out, num_keys - key0, p.softmax_scale * kLog2e, lane);
        for (int column = 0; column < p.width; column += Tile::kSlab) {
            const uint32_t stage = next_stage();
            if (!rows.active) continue;
            float y[Tile::kSlab / 8][4];
            multiply_tokens<Tile>(y, probabilities, stage, lane);
            add_output<Tile>(out, y, softmax.inverse, stage + weight, lane);
        }
    }
    cp_async_wait<0>();
    if (rows.active) store_fwd<Tile>(p, rows, out, softmax, lane);
}

template <class Tile>
int64_t num_ctas(const QFormerAttentionParams& p) {
    const int tiles = (p.num_queries + 15) / 16 * p.num_heads;
    const int per_cta = QFormerRows::tiles_per_cta(p.num_queries, Tile::kWarps, Tile::kHeads);
    return int64_t((tiles + per_cta - 1) / per_cta) * p.batch;
}

// What blocks of so many tokens cost: each its size and a projection of the queries.
inline int64_t work_of_blocks(const QFormerAttentionParams& p, int keys) {
    return int64_t(p.num_tokens + keys - 1) / keys * (keys + 64);
}

template <class Tile>
Error launch_fwd(const QFormerAttentionParams& p, Stream stream) {
    return launch(qformer_attention_fwd_kernel<Tile>, num_ctas<Tile>(p), Tile::kThreads,
                  Tile::kSharedBytes, stream, p);
}

template <class T>
Error launch_sm80(const QFormerAttentionParams& p, Stream stream) {
    using Wide = QFormerTile<T, 128, 144>;
    using Long = QFormerTile<T, 64, 272>;
    const int shared_bytes = shared_bytes_per_cta();
    if (p.head_dim > 64)
        return Wide::kSharedBytes <= shared_bytes
                   ? launch_fwd<Wide>(p, stream)
                   : launch_fwd<QFormerTile<T, 128, 144, 4>>(p, stream);
    const bool is_long = work_of_blocks(p, 272) <= work_of_blocks(p, 144);
    return is_long && Long::kSharedBytes <= shared_bytes
               ? launch_fwd<Long>(p, stream)
               : launch_fwd<QFormerTile<T, 64, 144>>(p, stream);
}

}  // namespace vlmkernels
