// Which blocks of queries a persistent CTA of the Hopper forward takes, in which order.
#pragma once

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

// CTA i takes the tiles i, i + n, i + 2 n, ... of an order: blocks of a head next to each other, or
// with kLongestFirst the blocks that see the most keys first (causal: the last ones), for all
// heads. Every other round goes backwards, so that no CTA always has the longer ones.
template <class Tile>
class FwdSchedule {
  public:
    __device__ explicit FwdSchedule(const AttentionParams& p)
        : blocks_(num_blocks(p)), heads_(p.num_heads), total_(num_tiles(p)), round_(0) {}
    __device__ bool valid() const { return round_ * int(gridDim.x) < total_; }
    __device__ void advance() { ++round_; }
    // (block, head, batch)
    __device__ int3 tile() const {
        const int i = index();
        if (i >= total_) return {blocks_, 0, 0};  // beyond the last row: nothing to do
        if constexpr (Tile::kLongestFirst) {
            const int all_heads = total_ / blocks_, head = i % all_heads;
            return {blocks_ - 1 - i / all_heads, head % heads_, head / heads_};
        }
        return {i % blocks_, i / blocks_ % heads_, i / blocks_ / heads_};
    }
    static constexpr int num_blocks(const AttentionParams& p) {
        return (p.seqlen_q + Tile::kBlockM - 1) / Tile::kBlockM;
    }
    static constexpr int num_tiles(const AttentionParams& p) {
        return num_blocks(p) * p.num_heads * p.batch;
    }

  private:
    __device__ int index() const {
        const int n = gridDim.x, i = blockIdx.x;
        return round_ * n + (round_ % 2 ? n - 1 - i : i);
    }
    int blocks_, heads_, total_, round_;
};

}  // namespace vlmkernels
