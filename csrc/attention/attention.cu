// Launchers: dtype and head_dim to the instance that takes them.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <iterator>
#include <utility>

#include "attention/instances.h"

namespace vlmkernels {

// Calls f.template operator()<Element, kTileDim>() with the first tile that holds head_dim.
template <class F>
static Error dispatch(const AttentionParams& p, F&& f) {
    Error error = cudaErrorInvalidValue;
    auto with_tile = [&]<int kTileDim>() {
        error = p.dtype == DType::kFloat16 ? f.template operator()<__half, kTileDim>()
                                           : f.template operator()<__nv_bfloat16, kTileDim>();
        return true;
    };
    [&]<size_t... i>(std::index_sequence<i...>) {
        (void)((p.head_dim <= kAttentionTileDims[i] &&
                with_tile.template operator()<kAttentionTileDims[i]>()) ||
               ...);
    }(std::make_index_sequence<std::size(kAttentionTileDims)>());
    return error;
}

Error launch_attention(const AttentionParams& p, Stream stream) {
    return dispatch(p, [&]<class Element, int kTileDim>() {
        return attention_fwd<Element, kTileDim>(p, stream);
    });
}

}  // namespace vlmkernels
