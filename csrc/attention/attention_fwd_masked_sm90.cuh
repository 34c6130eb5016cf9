// Forward on Hopper where the mask is more than causal, for float32 results, and with several query
// heads in the rows of a tile (HeadPacking). As attention_fwd_sm90.cuh, but the producer is a warp:
// it finds the blocks of keys that some query of the CTA sees, and writes beside each which one is
// next and whether anything of it is masked; consumers follow, and mask only there.
#pragma once

#include "attention/attention_fwd_sm90.cuh"
#include "attention/mask_sm90.cuh"

namespace vlmkernels {

struct MaskedFwdInputs {
    CUtensorMap q, k, v;  // q: packed_queries_map
    HeadPacking packing;
    int num_blocks, num_groups;  // of queries; of packing.heads heads
};

// The queries of a CTA, of packing.heads heads of one sequence.
template <class Tile>
struct MaskedFwdWork {
    const HeadPacking& packing;
    int token0, group, batch;  // group: of packing.heads heads
    Sequence sequence;

    __device__ MaskedFwdWork(const AttentionParams& p, const HeadPacking& packing, int3 tile)
        : packing(packing),
          token0(tile.x * num_tokens(packing)),
          group(tile.y),
          batch(tile.z),
          sequence(p, tile.z) {}
    __device__ bool empty() const { return token0 >= sequence.seqlen_q; }
    static constexpr int num_tokens(const HeadPacking& packing) {
        return Tile::kConsumers * packing.tokens;
    }
};

struct MaskedFwdSchedule : TileSchedule {
    const LongestFirst order;  // where the past is seen, most of it, the last queries see most

    __device__ MaskedFwdSchedule(const AttentionParams& p, const MaskedFwdInputs& in)
        : TileSchedule(p, in.num_blocks, in.num_groups),
          order(p.window_right >= 0 && (p.window_left < 0 || p.window_left > p.seqlen_k / 2)
                    ? LongestFirst::kLastBlock
                    : LongestFirst::kNo) {}
    __device__ int3 tile() const { return TileSchedule::tile(order); }
};

// A warp; its first lane starts the copies.
template <class Tile>
__device__ void produce_masked_fwd(const AttentionParams& p, const MaskedFwdInputs& in,
                                   const FwdShared<Tile>& shared) {
    typename Tile::QueryBarriers::State q_at;
    typename Tile::KeyBarriers::State k_at, v_at;
    const auto q_barriers = shared.q_barriers();
    const auto k_barriers = shared.k_barriers(), v_barriers = shared.v_barriers();
    const bool leader = threadIdx.x % 32 == 0;
    for (MaskedFwdSchedule schedule(p, in); schedule.valid(); schedule.advance()) {
        const MaskedFwdWork<Tile> work(p, in.packing, schedule.tile());
        if (work.empty()) continue;
        const Sequence& sequence = work.sequence;
        const int batch = p.cu_seqlens_q ? 0 : work.batch;
        const int head_k = work.group * in.packing.heads / (p.num_heads / p.num_heads_k);
        auto load = [&](const auto& barriers, auto& at, uint32_t tile, const CUtensorMap& map,
                        int block) {
            barriers.expect(at, Tile::K::kBytes);
            load_heads<typename Tile::K>(tile, map, barriers.full(at),
                                         sequence.start_k + block * Tile::kBlockN, head_k, batch);
        };
        auto load_values = [&](int block) {
            if (block < 0) return;
            v_barriers.wait_empty(v_at);
            if (leader) load(v_barriers, v_at, shared.v(v_at.stage), in.v, block);
            v_at.advance();
        };
        MaskedScores::KeyTiles<Tile::kBlockN> tiles(p, sequence, work.token0,
                                                    work.num_tokens(in.packing));
        auto tile = tiles.first();
        q_barriers.wait_empty(q_at);
        if (leader) {
            store_shared(shared.word_after_queries(q_at.stage), tile_word(tile));
            q_barriers.expect(q_at, Tile::kConsumers * in.packing.rows() * Tile::kHeadDim * 2);
            for (int i = 0; i < Tile::kConsumers; ++i)
                load_packed_queries<typename Tile::Q>(
                    shared.q(q_at.stage, i), in.q, q_barriers.full(q_at),
                    sequence.start_q + work.token0 + i * in.packing.tokens, work.group, batch);
        }
        q_at.advance();
        int last = -1;
        while (tile.index >= 0) {
            const auto next = tiles.next(tile);
            k_barriers.wait_empty(k_at);
            if (leader) {
                store_shared(shared.word_after_keys(k_at.stage), tile_word(next));
                load(k_barriers, k_at, shared.k(k_at.stage), in.k, tile.index);
            }
            k_at.advance();
            load_values(last);
            last = tile.index;
            tile = next;
        }
        load_values(last);
    }
}

// The two rows of a thread. One that does not exist has the token seqlen_q.
template <class Tile>
struct MaskedFwdRows {
    int token[2], head[2];

    __device__ explicit MaskedFwdRows(const MaskedFwdWork<Tile>& work) {
        const HeadPacking& packing = work.packing;
        const int thread = thread_in_block();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = thread / 32 % 4 * 16 + thread % 32 / 4 + half * 8;
            token[half] = work.token0 + thread / 128 * packing.tokens + row / packing.heads;
            head[half] = work.group * packing.heads + row % packing.heads;
            if (row >= packing.rows() || token[half] >= work.sequence.seqlen_q)
                token[half] = work.sequence.seqlen_q;
        }
    }
};

// Of the first block of keys: what follows the sequence.
template <class Tile>
__device__ void clear_neighbours(FwdConsumer<Tile>& consumer, const AttentionParams& p, int batch,
                                 int word) {
    const int num_keys = Sequence(p, batch).seqlen_k - tile_index(word) * Tile::kBlockN;
    if (num_keys < Tile::kBlockN) consumer.clear_values(num_keys);
}

// What happens to scores before softmax. Seldom needed: rows and sequence stay in no registers.
template <class Tile>
__device__ void mask_scores(typename FwdConsumer<Tile>::Scores& scores, const AttentionParams& p,
                            const HeadPacking& packing, int3 tile, int word) {
    if (whole_tile(word) && !shapes_scores(p)) return;
    const MaskedFwdWork<Tile> work(p, packing, tile);
    const MaskedFwdRows<Tile> rows(work);
    const int key0 = tile_index(word) * Tile::kBlockN;
    shape_scores<typename Tile::Element, false>(scores, p, work.sequence, rows.head, rows.token,
                                                key0, [](auto...) {});
    if (!whole_tile(word)) hide_scores<false>(scores, p, work.sequence, rows.token, key0);
}

template <class Tile>
__device__ void attend_masked_fwd(FwdConsumer<Tile>& consumer, const AttentionParams& p,
                                  const HeadPacking& packing, int3 tile,
                                  typename FwdConsumer<Tile>::Out& out, RowSoftmax& softmax) {
    typename FwdConsumer<Tile>::Scores scores;
    typename FwdConsumer<Tile>::Probs probs;
    float correction[2];
    const float scale_log2 = score_unit(p) * kLog2e;
    consumer.wait_queries();
    int word = consumer.next_word;
    if (word < 0) return consumer.release_queries();
    consumer.multiply_keys(scores);
    if (p.cu_seqlens_k || p.cache_seqlens) clear_neighbours(consumer, p, tile.z, word);
    wgmma_wait<0>();
    consumer.release_keys();
    mask_scores<Tile>(scores, p, packing, tile, word);
    softmax.template update<true>(scores, scale_log2, correction);
    pack_probabilities<typename Tile::Element>(probs, scores);
    bool accumulate = false;
    while (consumer.next_word >= 0) {
        word = consumer.next_word;
        consumer.wait_turn();
        consumer.multiply_keys(scores);
        consumer.multiply_values(out, probs, accumulate);
        consumer.give_turn(consumer.next_index());
        wgmma_wait<1>();
        consumer.release_keys();
        mask_scores<Tile>(scores, p, packing, tile, word);
        softmax.template update<true>(scores, scale_log2, correction);
        wgmma_wait<0>();
        consumer.release_values();
        scale_rows(out, correction);
        pack_probabilities<typename Tile::Element>(probs, scores);
        accumulate = true;
    }
    consumer.release_queries();
    consumer.multiply_values(out, probs, accumulate);
    wgmma_wait<0>();
    consumer.release_values();
}

template <class Tile>
__device__ void store_masked_fwd(const FwdConsumer<Tile>& consumer, const AttentionParams& p,
                                 const MaskedFwdWork<Tile>& work,
                                 typename FwdConsumer<Tile>::Out& out, RowSoftmax& softmax) {
    const MaskedFwdRows<Tile> rows(work);
    softmax.finish();
    const float factor[2] = {softmax.inverse_sum(0), softmax.inverse_sum(1)};
    scale_rows(out, factor);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int token = rows.token[half], head = rows.head[half];
        const bool valid = token < work.sequence.seqlen_q;
        if (valid && consumer.lane % 4 == 0)
            p.lse[work.sequence.lse_index(p, token, head)] = softmax.lse(half, score_unit(p));
        auto store = [&]<class T>() {
            store_row(out, half,
                      valid ? work.sequence.template queries<T>(p.out, token, head) : nullptr,
                      p.head_dim, consumer.lane);
        };
        if (p.float32_out)
            store.template operator()<float>();
        else
            store.template operator()<typename Tile::Element>();
    }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kChoice.ctas)
    attention_fwd_masked_sm90_kernel(const __grid_constant__ MaskedFwdInputs in,
                                     const __grid_constant__ AttentionParams p) {
    if constexpr (kHopperCode) {
        extern __shared__ __align__(1024) unsigned char shared_bytes[];
        const FwdShared<Tile> shared{shared_address(shared_bytes)};
        if (threadIdx.x == 0) shared.init();
        __syncthreads();
        if (threadIdx.x >= Tile::kConsumerThreads) {
            decrease_registers<Tile::kProducerRegisters>();
            if (threadIdx.x < Tile::kConsumerThreads + 32) produce_masked_fwd(p, in, shared);
            return;
        }
        increase_registers<Tile::kConsumerRegisters>();
        FwdConsumer<Tile> consumer(shared);
        if (consumer.index == Tile::kConsumers - 1) consumer.give_turn(0);
        for (MaskedFwdSchedule schedule(p, in); schedule.valid(); schedule.advance()) {
            const int3 tile = schedule.tile();
            if (MaskedFwdWork<Tile>(p, in.packing, tile).empty()) continue;
            typename FwdConsumer<Tile>::Out out = {};
            RowSoftmax softmax;
            attend_masked_fwd(consumer, p, in.packing, tile, out, softmax);
            store_masked_fwd(consumer, p, MaskedFwdWork<Tile>(p, in.packing, tile), out, softmax);
        }
    }
}

// heads: of q in the rows of a tile, all that share a key head or 1.
template <class Element, int kTileDim>
Error attention_fwd_masked_sm90(AttentionParams p, int heads, Stream stream) {
    using Tile = AttentionFwdTile90<Element, kTileDim, FwdCase::kMasked>;
    MaskedFwdInputs in;
    in.packing = HeadPacking::of(heads);
    const int tokens = MaskedFwdWork<Tile>::num_tokens(in.packing);
    in.num_blocks = (p.seqlen_q + tokens - 1) / tokens;
    in.num_groups = p.num_heads / heads;
    Error error = packed_queries_map<typename Tile::Q>(&in.q, p, in.packing);
    if (!error) error = keys_map<typename Tile::K>(&in.k, p.k, p);
    if (!error) error = keys_map<typename Tile::K>(&in.v, p.v, p);
    const int tiles = in.num_blocks * in.num_groups * p.batch, ctas = std::min(tiles, num_sms());
    if (!error) error = order_tiles(p, tokens, false, tiles == ctas, stream);
    if (error) return error;
    return launch(attention_fwd_masked_sm90_kernel<Tile>, ctas, Tile::kThreads, Tile::kSharedBytes,
                  stream, in, p);
}

}  // namespace vlmkernels
