// Launchers: dtype and head_dim to the instance that takes them.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <iterator>
#include <utility>

#include "attention/attention_rows.cuh"
#include "attention/cache_append.cuh"
#include "attention/instances.h"

namespace vlmkernels {

// Calls f.template operator()<Element, kTileDim>() with the first of the tiles that holds head_dim.
template <const auto& kTileDims, class F>
static Error dispatch(const AttentionParams& p, F&& f) {
    Error error = cudaErrorInvalidValue;
    auto with_tile = [&]<int kTileDim>() {
        error = p.dtype == DType::kFloat16 ? f.template operator()<__half, kTileDim>()
                                           : f.template operator()<__nv_bfloat16, kTileDim>();
        return true;
    };
    [&]<size_t... i>(std::index_sequence<i...>) {
        (void)((p.head_dim <= kTileDims[i] && with_tile.template operator()<kTileDims[i]>()) ||
               ...);
    }(std::make_index_sequence<std::size(kTileDims)>());
    return error;
}

Error launch_attention(const AttentionParams& p, Stream stream) {
    Error error = attention_id_ranges(p, stream);
    if (error) return error;
    if (takes_sm90(p)) return launch_attention_sm90(p, stream);
    if (p.plain())
        return dispatch<kAttentionTileDims>(p, [&]<class Element, int kTileDim>() {
            return attention_fwd<Element, kTileDim, PlainScores>(p, stream);
        });
    return dispatch<kMaskedTileDims>(p, [&]<class Element, int kTileDim>() {
        return attention_fwd<Element, kTileDim, MaskedScores>(p, stream);
    });
}

// dq, dk and dv.
static Error launch_backward_of_qkv(const AttentionBackwardParams& p, Stream stream) {
    if (takes_sm90(p)) return launch_attention_backward_sm90(p, stream);
    if (p.plain())
        return dispatch<kAttentionTileDims>(p, [&]<class Element, int kTileDim>() {
            return attention_bwd<Element, kTileDim, PlainScores>(p, stream);
        });
    return dispatch<kMaskedTileDims>(p, [&]<class Element, int kTileDim>() {
        return attention_bwd<Element, kTileDim, MaskedScores>(p, stream);
    });
}

Error launch_attention_backward(const AttentionBackwardParams& p, Stream stream) {
    Error error = p.dtype == DType::kFloat16 ? attention_row_stats<__half>(p, stream)
                                             : attention_row_stats<__nv_bfloat16>(p, stream);
    if (!error) error = attention_id_ranges(p, stream);
    if (!error) error = launch_backward_of_qkv(p, stream);
    if (error || !p.dbias.data) return error;
    if (takes_sm90(p)) return launch_attention_dbias_sm90(p, stream);
    return dispatch<kMaskedTileDims>(p, [&]<class Element, int kTileDim>() {
        return attention_dbias<Element, kTileDim>(p, stream);
    });
}

// Rows that share a key head. Beyond a few tiles of them the forward kernel is the better one.
static bool takes_forward(const AttentionParams& p) {
    if (p.block_table) return false;  // the forward kernel knows no pages
    return int64_t(p.seqlen_q) * (p.num_heads / p.num_heads_k) > 4 * kDecodeRows;
}

int attention_decode_splits(const AttentionParams& p) {
    if (takes_forward(p) || p.batch == 0 || p.seqlen_q == 0) return 1;
    const int rows = p.seqlen_q * (p.num_heads / p.num_heads_k);
    const int64_t ctas = int64_t(rows + kDecodeRows - 1) / kDecodeRows * p.num_heads_k * p.batch;
    const int64_t wanted = 2 * num_sms() / ctas;               // two CTAs on each SM
    const int64_t useful = (int64_t(p.seqlen_k) + 127) / 128;  // 128 keys for each split
    return int(std::clamp<int64_t>(std::min(wanted, useful), 1, 128));
}

Error launch_cache_append(const CacheAppendParams& p, Stream stream) {
    return p.dtype == DType::kFloat16 ? cache_append<__half>(p, stream)
                                      : cache_append<__nv_bfloat16>(p, stream);
}

Error launch_attention_decode(const AttentionDecodeParams& p, Stream stream) {
    if (takes_forward(p)) return launch_attention(p, stream);
    return dispatch<kAttentionTileDims>(p, [&]<class Element, int kTileDim>() {
        Error error = attention_decode<Element, kTileDim>(p, stream);
        return error || p.num_splits == 1 ? error : attention_combine<Element>(p, stream);
    });
}

}  // namespace vlmkernels
