// Launchers of the Hopper kernels: what they take, and head_dim and dtype to instance.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <climits>
#include <iterator>
#include <utility>

#include "attention/attention_tiles.h"
#include "attention/instances.h"
#include "attention/tile_order.cuh"

namespace vlmkernels {

// TMA has no use for broadcast dimensions, and strides below 2^40 bytes.
static bool has_tensor_map(const HeadsView& view, int64_t tokens, int num_heads, int batch) {
    auto fits = [](int64_t size, int64_t stride) {
        return size == 1 || (stride > 0 && stride < int64_t(1) << 39);
    };
    return fits(tokens, view.token_stride) && fits(num_heads, view.head_stride) &&
           fits(batch, view.batch_stride);
}

static bool has_tensor_maps(const AttentionParams& p) {
    const int batch = p.cu_seqlens_q ? 1 : p.batch;
    return has_tensor_map(p.q, p.num_tokens_q, p.num_heads, batch) &&
           has_tensor_map(p.k, p.num_tokens_k, p.num_heads_k, batch) &&
           has_tensor_map(p.v, p.num_tokens_k, p.num_heads_k, batch);
}

static bool has_tokens(const AttentionParams& p) {
    return p.seqlen_q > 0 && p.seqlen_k > 0 && p.num_tokens_q > 0 && p.num_tokens_k > 0;
}

// What all Hopper kernels ask for.
static bool fits_sm90(const AttentionParams& p) {
    const int64_t blocks = (int64_t(std::max(p.seqlen_q, p.seqlen_k)) + 63) / 64;
    return has_hopper() && has_tokens(p) && has_tensor_maps(p) &&
           blocks * p.num_heads * p.batch <
               INT_MAX - 65536;  // a round may end beyond the last tile
}

static bool takes_plain(const AttentionParams& p) {
    return p.plain() && !p.float32_out && hopper_tile_dim<kHopperTileDims>(p.head_dim);
}

bool takes_sm90(const AttentionParams& p) {
    return fits_sm90(p) && (takes_plain(p) || hopper_tile_dim<kHopperMaskedTileDims>(p.head_dim));
}

bool takes_sm90(const AttentionBackwardParams& p) {
    return hopper_tile_dim<kHopperWideBwdTileDims>(p.head_dim) && fits_sm90(p) &&
           has_tensor_map(p.dout, p.num_tokens_q, p.num_heads, p.cu_seqlens_q ? 1 : p.batch);
}

// Calls f.template operator()<Element, kTileDim>() with the tile of head_dim.
template <const auto& kTileDims, class F>
static Error dispatch(const AttentionParams& p, F&& f) {
    Error error = cudaErrorInvalidValue;
    auto with = [&]<int kTileDim>() {
        if (kTileDim != hopper_tile_dim<kTileDims>(p.head_dim)) return;
        error = p.dtype == DType::kFloat16 ? f.template operator()<__half, kTileDim>()
                                           : f.template operator()<__nv_bfloat16, kTileDim>();
    };
    [&]<size_t... i>(std::index_sequence<i...>) {
        (with.template operator()<kTileDims[i]>(), ...);
    }(std::make_index_sequence<std::size(kTileDims)>());
    return error;
}

// Heads of q to share a tile: those of a key head where a tile per head would have more empty rows.
static int packed_heads(const AttentionParams& p) {
    const int heads = p.num_heads / p.num_heads_k;
    if (heads == 1 || heads > 64) return 1;
    auto tiles = [&](int64_t rows) { return (p.seqlen_q + rows - 1) / rows; };
    const bool is_short = takes_plain(p) && p.seqlen_q <= 64;
    const int64_t alone = is_short ? heads * 64 : heads * tiles(128) * 128;
    return tiles(2 * (64 / heads)) * 128 < alone ? heads : 1;
}

Error launch_attention_sm90(const AttentionParams& p, Stream stream) {
    const int heads = packed_heads(p);
    if (heads == 1 && takes_plain(p))
        return dispatch<kHopperTileDims>(p, [&]<class Element, int kTileDim>() {
            return attention_fwd_sm90<Element, kTileDim>(p, stream);
        });
    return dispatch<kHopperMaskedTileDims>(p, [&]<class Element, int kTileDim>() {
        return attention_fwd_masked_sm90<Element, kTileDim>(p, heads, stream);
    });
}

Error launch_attention_backward_sm90(const AttentionBackwardParams& p, Stream stream) {
    if (p.head_dim > 128)
        return dispatch<kHopperWideBwdTileDims>(p, [&]<class Element, int kTileDim>() {
            return attention_bwd_wide_sm90<Element, kTileDim>(p, stream);
        });
    if (p.plain())
        return dispatch<kHopperTileDims>(p, [&]<class Element, int kTileDim>() {
            return attention_bwd_sm90<Element, kTileDim, PlainScores>(p, stream);
        });
    return dispatch<kHopperMaskedBwdTileDims>(p, [&]<class Element, int kTileDim>() {
        return attention_bwd_sm90<Element, kTileDim, MaskedScores>(p, stream);
    });
}

Error launch_attention_dbias_sm90(const AttentionBackwardParams& p, Stream stream) {
    return dispatch<kHopperDbiasTileDims>(p, [&]<class Element, int kTileDim>() {
        return attention_dbias_sm90<Element, kTileDim>(p, stream);
    });
}

}  // namespace vlmkernels
