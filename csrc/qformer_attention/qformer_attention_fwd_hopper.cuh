// Forward on sm_90a: the walk of qformer_attention_fwd.cuh, the products with x by wgmma. A
// producer warpgroup copies slabs of x (cp.async, zeros for tokens that do not exist) and of the
// weights (TMA); two consumer warpgroups of 64 rows each multiply. q' and p are wgmma's operand a
// in registers. The products with the weights stay with mma.sync: a warpgroup holds rows of several
// heads, which have different weights, and fragments of both instructions are the same.
#pragma once

#include "common/gemm_hopper.cuh"
#include "qformer_attention/qformer_attention_fwd.cuh"

namespace vlmkernels {

template <class Element_, int kDim_, int kKeys_, int kSlab_, int kStages_>
struct QFormerHopperTile {
    using Element = Element_;
    static constexpr int kDim = kDim_, kKeys = kKeys_, kSlab = kSlab_, kStages = kStages_;
    static constexpr int kWarps = 8, kThreads = 384, kHeads = 4;
    static constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
    static_assert(registers_fit(kThreads, kProducerRegisters, kConsumerRegisters));
    using A = SharedTile<kKeys, kSlab>;      // of x
    using Weight = SharedTile<kDim, kSlab>;  // of one head
    static constexpr int kWeightBytes = Weight::kBytes;
    static constexpr int kStageBytes = A::kBytes + kHeads * kWeightBytes;
    static constexpr int kQueryStart = kStages * kStageBytes;
    static constexpr int kBarrierStart = kQueryStart + kWarps * 16 * kDim * 2;
    static constexpr int kSharedBytes = kBarrierStart + PipelineBarriers<kStages>::kBytes;
    static constexpr Producer kProducer = Producer::kThreads;
    static constexpr int kLag = kStages - 2;  // stages that are copied before one is announced
    // Scores of more tokens leave no registers for an output of blocks before.
    static constexpr bool kOneBlock = kKeys > 176;
    // wgmma takes up to 256 columns.
    static constexpr int kParts = kKeys > 256 ? 2 : 1, kPart = kKeys / kParts;
    static_assert(A::kPanels == 1 && kPart % 8 == 0 && kStageBytes % 1024 == 0);
    static_assert(kSharedBytes <= 227 * 1024);
};

// The heads whose rows a warpgroup holds, and the weights of the first within a stage.
struct QFormerHeads {
    int mine, count, weights;  // mine: the warp's own, from the warpgroup's first on

    template <class Tile>
    __device__ static QFormerHeads of(const QFormerAttentionParams& p, int warp) {
        const QFormerRows first(p, Tile::kWarps, Tile::kHeads, warp & ~3);
        const QFormerRows rows(p, Tile::kWarps, Tile::kHeads, warp);
        const QFormerRows last(p, Tile::kWarps, Tile::kHeads, warp | 3);
        return {rows.head - first.head, last.head - first.head + 1,
                Tile::A::kBytes + (first.head - first.first_head) * Tile::kWeightBytes};
    }
    // c (+)= a b_h for the rows of each head h. load(a, mine): the warp's fragments of a, which are
    // zero where the head is not the warp's own; b(weights of h, k): the descriptor.
    template <class Tile, Major kMajorB, int kSteps, int kN, class Load, class B>
    __device__ void multiply(float (&c)[kN][4], uint32_t stage, bool accumulate, Load&& load,
                             B&& b) const {
        for (int head = 0; head < count; ++head) {
            uint32_t a[kSteps][4];
            load(a, head == mine);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < kSteps; ++k)
                wgmma<typename Tile::Element, Major::kK, kMajorB>(
                    c, a[k], b(stage + weights + head * Tile::kWeightBytes, k),
                    accumulate || head > 0 || k > 0);
            wgmma_commit();
            wgmma_wait<0>();
        }
    }
};

// out += (factor y) weight_v[:, slab]^T, factor of each row
template <class Tile>
__device__ void add_output(float (&out)[Tile::kDim / 8][4], float (&y)[Tile::kSlab / 8][4],
                           const float (&factor)[2], const QFormerHeads& heads, uint32_t stage) {
    using W = typename Tile::Weight;
    uint32_t a[Tile::kSlab / 16][4];
#pragma unroll
    for (int n = 0; n < Tile::kSlab / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) y[n][e] *= factor[e / 2];
#pragma unroll
    for (int k = 0; k < Tile::kSlab / 16; ++k)
        pack_a<typename Tile::Element>(a[k], y[k * 2], y[k * 2 + 1]);
    heads.multiply<Tile, Major::kK, Tile::kSlab / 16>(
        out, stage, true,
        [&](uint32_t (&rows)[Tile::kSlab / 16][4], bool mine) {
#pragma unroll
            for (int k = 0; k < Tile::kSlab / 16; ++k)
#pragma unroll
                for (int i = 0; i < 4; ++i) rows[k][i] = mine ? a[k][i] : 0;
        },
        [](uint32_t weight, int k) { return W::k_major(weight) + W::k_step(k); });
}

// scores (+)= a x[:, slab]^T
template <class Tile>
__device__ void multiply_scores(float (&scores)[Tile::kParts][Tile::kPart / 8][4],
                                const uint32_t (&a)[Tile::kSlab / 16][4], uint32_t x,
                                bool accumulate) {
    using X = typename Tile::A;
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < Tile::kSlab / 16; ++k)
#pragma unroll
        for (int part = 0; part < Tile::kParts; ++part)
            wgmma<typename Tile::Element, Major::kK, Major::kK>(
                scores[part], a[k], X::k_major(x, part * Tile::kPart) + X::k_step(k),
                accumulate || k > 0);
    wgmma_commit();
    wgmma_wait<0>();
}

// y = p x[:, slab]
template <class Tile>
__device__ void multiply_values(float (&y)[Tile::kSlab / 8][4],
                                const uint32_t (&p)[Tile::kKeys / 16][4], uint32_t x) {
    using X = typename Tile::A;
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < Tile::kKeys / 16; ++k)
        wgmma<typename Tile::Element, Major::kK, Major::kMN>(y, p[k],
                                                             X::mn_major(x) + X::mn_step(k), k > 0);
    wgmma_commit();
    wgmma_wait<0>();
}

// The consumers' stages, one after the other.
template <class Tile>
struct QFormerStages {
    uint32_t shared;
    PipelineBarriers<Tile::kStages> barriers;
    int lane;
    PipelineState<Tile::kStages> at;

    __device__ uint32_t wait() const {
        barriers.wait_full(at);
        return shared + at.stage * Tile::kStageBytes;
    }
    __device__ void release() {
        __syncwarp();
        if (lane == 0) barriers.release(at);
        at.advance();
    }
};

template <class Tile>
__device__ void consume(const QFormerAttentionParams& p, const QFormerRows& rows, uint32_t q,
                        int warp, QFormerStages<Tile>& stages) {
    constexpr int kHalf = Tile::kSlab / 2;
    const int lane = stages.lane, num_keys = rows.num_keys(p);
    rows.template load_queries<Tile>(q, p, lane);
    cp_async_commit();
    cp_async_wait<0>();
    __syncwarp();
    const int weight = Tile::A::kBytes + (rows.head - rows.first_head) * Tile::kWeightBytes;
    const auto heads = QFormerHeads::of<Tile>(p, warp);
    float out[1][Tile::kDim / 8][4] = {};
    QFormerSoftmax<Tile> softmax;
    for (int key0 = 0; key0 < num_keys; key0 += Tile::kKeys) {
        float scores[Tile::kParts][Tile::kPart / 8][4];
        for (int column = 0; column < p.width; column += Tile::kSlab) {
            const uint32_t stage = stages.wait();
            uint32_t a[2][kHalf / 16][4];
#pragma unroll
            for (int half = 0; half < 2; ++half)
                project<Tile, kHalf>(a[half], q, stage + weight, half * kHalf / 8, lane);
            multiply_scores<Tile>(scores, reinterpret_cast<uint32_t (&)[Tile::kSlab / 16][4]>(a),
                                  stage, column > 0);
            fence_proxy_async();  // project() read weights, in whose place TMA writes next
            stages.release();
        }
        uint32_t probabilities[Tile::kKeys / 16][4];
        softmax(probabilities, reinterpret_cast<float (&)[1][Tile::kKeys / 8][4]>(scores), out,
                num_keys - key0, p.softmax_scale * kLog2e, lane);
        for (int column = 0; column < p.width; column += Tile::kSlab) {
            const uint32_t stage = stages.wait();
            float y[Tile::kSlab / 8][4];
            multiply_values<Tile>(y, probabilities, stage);
            add_output<Tile>(out[0], y, softmax.inverse, heads, stage);
            stages.release();
        }
        if (Tile::kOneBlock) break;
    }
    if (rows.active) store_fwd<Tile>(p, rows, out, softmax, lane);
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    qformer_attention_fwd_hopper_kernel(const __grid_constant__ CUtensorMap weight_k,
                                        const __grid_constant__ CUtensorMap weight_v,
                                        const __grid_constant__ QFormerAttentionParams p) {
    if constexpr (kHopperCode) {
        extern __shared__ __align__(1024) unsigned char shared[];
        const uint32_t start = shared_address(shared);
        const PipelineBarriers<Tile::kStages> barriers{start + Tile::kBarrierStart};
        if (threadIdx.x == 0) {
            barriers.init(128, Tile::kWarps);
            fence_mbarrier_init();
        }
        __syncthreads();
        const int warp = warp_uniform(threadIdx.x / 32);
        const QFormerRows rows(p, Tile::kWarps, Tile::kHeads, warp & (Tile::kWarps - 1));
        if (warp >= Tile::kWarps) {
            decrease_registers<Tile::kProducerRegisters>();
            const int num_keys = rows.num_keys(p), thread = threadIdx.x - Tile::kWarps * 32;
            const int slabs = (p.width + Tile::kSlab - 1) / Tile::kSlab;
            QFormerStep<Tile> at;
            produce_stages<Tile>(
                start, barriers, gridDim.x, thread,
                [&](int) { return (num_keys + Tile::kKeys - 1) / Tile::kKeys * 2 * slabs; },
                [&](const HopperStage& stage, int, int) {
                    if (thread == 0) {
                        mbarrier_expect(stage.full, rows.num_heads * Tile::kWeightBytes);
                        for (int i = 0; i < rows.num_heads; ++i)
                            load_operand<typename Tile::Weight>(
                                stage.b + i * Tile::kWeightBytes, at.second ? &weight_v : &weight_k,
                                stage.full, (rows.first_head + i) * p.head_dim, at.column);
                    }
                    load_tokens<Tile, 128>(stage.a, p, rows.image, at, num_keys, thread);
                    at.advance(p.width);
                });
        } else {
            increase_registers<Tile::kConsumerRegisters>();
            const uint32_t q = start + Tile::kQueryStart + warp * 16 * Tile::kDim * 2;
            QFormerStages<Tile> stages{start, barriers, int(threadIdx.x % 32), {}};
            consume<Tile>(p, rows, q, warp, stages);
        }
    }
}

template <class Tile>
Error launch_hopper(const QFormerAttentionParams& p, Stream stream) {
    CUtensorMap maps[2];
    const void* weights[2] = {p.weight_k, p.weight_v};
    for (int i = 0; i < 2; ++i)
        if (Error error = operand_map<typename Tile::Weight>(
                &maps[i], weights[i], p.dtype, p.num_heads * p.head_dim, p.width, p.width))
            return error;
    return launch(qformer_attention_fwd_hopper_kernel<Tile>, num_ctas<Tile>(p), Tile::kThreads,
                  Tile::kSharedBytes, stream, maps[0], maps[1], p);
}

template <class T>
Error launch(const QFormerAttentionParams& p, Stream stream) {
    if (!has_hopper() || p.width == 0) return launch_sm80<T>(p, stream);
    if (p.head_dim > 64) return launch_hopper<QFormerHopperTile<T, 128, 144, 32, 4>>(p, stream);
    if (p.num_tokens <= 144 || p.num_tokens > 272)
        return work_of_blocks(p, 144) <= work_of_blocks(p, 176)
                   ? launch_hopper<QFormerHopperTile<T, 64, 144, 64, 4>>(p, stream)
                   : launch_hopper<QFormerHopperTile<T, 64, 176, 64, 3>>(p, stream);
    return launch_hopper<QFormerHopperTile<T, 64, 272, 64, 3>>(p, stream);
}

}  // namespace vlmkernels
