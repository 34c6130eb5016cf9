// Heads on their way to shared memory: tensor maps and TMA loads of blocks of tokens of one head.
#pragma once

#include <cuda_runtime.h>

#include "attention/attention.h"
#include "common/hopper.cuh"
#include "common/shared_tile.cuh"
#include "common/tensor_map.h"

namespace vlmkernels {

// Of [batch, num_heads, seqlen, head_dim]; packed: batch 1, all tokens one after the other.
template <class SharedTile>
Error heads_map(CUtensorMap* map, const HeadsView& view, const AttentionParams& p, int64_t tokens,
                int num_heads) {
    return encode_tensor_map(map, view.data, p.dtype,
                             {{p.head_dim, 1, SharedTile::kPanelColumns},
                              {tokens, view.token_stride, SharedTile::kRows},
                              {num_heads, view.head_stride, 1},
                              {p.cu_seqlens_q ? 1 : p.batch, view.batch_stride, 1}},
                             SharedTile::kSwizzle);
}
template <class SharedTile>
Error queries_map(CUtensorMap* map, const HeadsView& view, const AttentionParams& p) {
    return heads_map<SharedTile>(map, view, p, p.cu_seqlens_q ? p.num_tokens_q : p.seqlen_q,
                                 p.num_heads);
}
template <class SharedTile>
Error keys_map(CUtensorMap* map, const HeadsView& view, const AttentionParams& p) {
    return heads_map<SharedTile>(map, view, p, p.cu_seqlens_q ? p.num_tokens_k : p.seqlen_k,
                                 p.num_heads_k);
}

// Rows of a tile of queries: heads of a token next to each other, then the next token.
struct HeadPacking {
    int heads;   // that share a key head, or 1
    int tokens;  // in 64 rows: 64 / heads

    static constexpr HeadPacking of(int heads) { return {heads, 64 / heads}; }
    constexpr int rows() const { return heads * tokens; }
};

// Of [batch, num_heads / heads, seqlen, heads, head_dim].
template <class SharedTile>
Error packed_queries_map(CUtensorMap* map, const AttentionParams& p, HeadPacking packing) {
    const HeadsView& q = p.q;
    return encode_tensor_map(
        map, q.data, p.dtype,
        {{p.head_dim, 1, SharedTile::kPanelColumns},
         {packing.heads, q.head_stride, packing.heads},
         {p.cu_seqlens_q ? p.num_tokens_q : p.seqlen_q, q.token_stride, packing.tokens},
         {p.num_heads / packing.heads, q.head_stride * packing.heads, 1},
         {p.cu_seqlens_q ? 1 : p.batch, q.batch_stride, 1}},
        SharedTile::kSwizzle);
}

template <class SharedTile>
__device__ void load_packed_queries(uint32_t tile, const CUtensorMap& map, uint32_t barrier,
                                    int token, int head_k, int batch) {
#pragma unroll
    for (int panel = 0; panel < SharedTile::kPanels; ++panel)
        tma_load(tile + panel * SharedTile::kPanelBytes, &map, barrier,
                 panel * SharedTile::kPanelColumns, 0, token, head_k, batch);
}

template <class SharedTile>
__device__ void load_heads(uint32_t tile, const CUtensorMap& map, uint32_t barrier, int token,
                           int head, int batch) {
#pragma unroll
    for (int panel = 0; panel < SharedTile::kPanels; ++panel)
        tma_load(tile + panel * SharedTile::kPanelBytes, &map, barrier,
                 panel * SharedTile::kPanelColumns, token, head, batch);
}

}  // namespace vlmkernels
