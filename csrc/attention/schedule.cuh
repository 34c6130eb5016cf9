// Which blocks of which heads a persistent CTA of the Hopper kernels takes, in which order.
#pragma once

#include "attention/instances.h"
#include "attention/sequence.cuh"

namespace vlmkernels {

// A block of queries of one head, and the blocks of keys that it sees.
template <class Tile>
struct FwdWork {
    int row0, head, batch;
    Sequence sequence;
    int num_rows;      // <= 0: nothing to do
    int num_blocks;    // of keys that some row sees
    int num_unmasked;  // of them, from the first on, that every row sees whole

    __device__ FwdWork(const AttentionParams& p, int3 tile)
        : row0(tile.x * Tile::kBlockM), head(tile.y), batch(tile.z), sequence(p, tile.z) {
        num_rows = sequence.seqlen_q - row0;
        const int last = min(row0 + Tile::kBlockM, sequence.seqlen_q) - 1;
        const int most = num_rows > 0 ? sequence.visible_keys(last) : 0;
        num_blocks = (most + Tile::kBlockN - 1) / Tile::kBlockN;
        num_unmasked = sequence.visible_keys(row0) / Tile::kBlockN;
    }
};

// CTA i takes the tiles i, i + n, i + 2 n, ... of an order: that of tile_order, for all heads, or
// blocks of a head next to each other, or with kLongestFirst the blocks with the most work first,
// for all heads. Every other round goes backwards, so that no CTA always has the longer ones.
enum class LongestFirst { kNo, kLastBlock, kFirstBlock };

class TileSchedule {
  public:
    __device__ TileSchedule(const AttentionParams& p, int blocks, int heads)
        : order_(p.tile_order),
          blocks_(blocks),
          heads_(heads),
          total_((order_ ? *order_ : blocks * p.batch) * heads),
          round_(0) {}
    __device__ bool valid() const { return round_ * int(gridDim.x) < total_; }
    __device__ void advance() { ++round_; }
    // (block, head, batch)
    __device__ int3 tile(LongestFirst longest_first) const {
        const int n = gridDim.x, cta = blockIdx.x;
        const int i = round_ * n + (round_ % 2 ? n - 1 - cta : cta);
        if (i >= total_) return {blocks_, 0, 0};  // beyond the last row: nothing to do
        if (order_) {
            const int2 tile = reinterpret_cast<const int2*>(order_)[1 + i / heads_];
            return {tile.x, i % heads_, tile.y};
        }
        if (longest_first == LongestFirst::kNo)
            return {i % blocks_, i / blocks_ % heads_, i / blocks_ / heads_};
        const int all_heads = total_ / blocks_, block = i / all_heads, head = i % all_heads;
        return {longest_first == LongestFirst::kLastBlock ? blocks_ - 1 - block : block,
                head % heads_, head / heads_};
    }

  private:
    int32_t* const& order_;  // of the params: no registers
    int blocks_, heads_, total_, round_;
};

template <class Tile>
struct FwdSchedule : TileSchedule {
    __device__ explicit FwdSchedule(const AttentionParams& p)
        : TileSchedule(p, num_blocks(p), p.num_heads) {}
    __device__ int3 tile() const {  // causal: the last queries see the most keys
        return TileSchedule::tile(Tile::kLongestFirst ? LongestFirst::kLastBlock
                                                      : LongestFirst::kNo);
    }
    static constexpr int num_blocks(const AttentionParams& p) {
        return (p.seqlen_q + Tile::kBlockM - 1) / Tile::kBlockM;
    }
    static constexpr int num_tiles(const AttentionParams& p) {
        return num_blocks(p) * p.num_heads * p.batch;
    }
};

template <class Tile>
struct BwdSchedule : TileSchedule {
    const bool causal;

    __device__ explicit BwdSchedule(const AttentionParams& p)
        : TileSchedule(p, num_blocks(p), num_heads(p)), causal(p.causal()) {}
    __device__ int3 tile() const {  // causal: the first keys are seen by the most queries
        return TileSchedule::tile(!causal       ? LongestFirst::kNo
                                  : Tile::kKeys ? LongestFirst::kFirstBlock
                                                : LongestFirst::kLastBlock);
    }
    static constexpr int num_heads(const AttentionParams& p) {
        return Tile::kKeys ? p.num_heads_k : p.num_heads;
    }
    static constexpr int num_blocks(const AttentionParams& p) {
        return ((Tile::kKeys ? p.seqlen_k : p.seqlen_q) + Tile::kRows - 1) / Tile::kRows;
    }
    static constexpr int num_tiles(const AttentionParams& p) {
        return num_blocks(p) * num_heads(p) * p.batch;
    }
};

// Fills p's tile_order with tiles of so many rows, or takes it away where it would not pay: CTAs
// have one tile each, or sequences are all as long as the longest.
inline Error order_tiles(AttentionParams& p, int rows, bool of_keys, bool one_round,
                         Stream stream) {
    const int64_t num_tokens = of_keys ? p.num_tokens_k : p.num_tokens_q;
    const int64_t longest = of_keys ? p.seqlen_k : p.seqlen_q;
    if (one_round || rows < kOrderedRows || num_tokens == longest * p.batch) p.tile_order = nullptr;
    return p.tile_order ? attention_tile_order(p, rows, of_keys, stream) : cudaSuccess;
}

}  // namespace vlmkernels
