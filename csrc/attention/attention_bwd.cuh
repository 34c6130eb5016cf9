// Backward in three kernels: row_stats (attention_rows.cuh), then dk and dv, then dq; a fourth one
// for dbias. With s = softmax_scale q k^T and p = exp(s - lse):
//   dv = p^T dout;  ds = p (dout v^T - delta);  dk = softmax_scale ds^T q;  dq = softmax_scale ds k
// where delta = rowsum(out dout) - dlse, as d lse / d s = p. dbias = ds; a softcap multiplies ds by
// its slope before dq and dk.
#pragma once

#include <cuda_runtime.h>

#include "attention/attention_bwd_dbias.cuh"
#include "attention/attention_bwd_dkdv.cuh"
#include "attention/attention_bwd_dq.cuh"
#include "attention/instances.h"
#include "common/launch.cuh"

namespace vlmkernels {

template <class Element, int kHeadDim, class Scores>
Error attention_bwd(const AttentionBackwardParams& p, Stream stream) {
    using DkdvTile = AttentionDkdvTile<Element, kHeadDim, Scores>;
    using DqTile = AttentionDqTile<Element, kHeadDim, Scores>;
    auto blocks = [](int64_t n, int block) { return (n + block - 1) / block; };
    const int64_t heads_k = int64_t(p.batch) * p.num_heads_k;
    const int64_t heads_q = int64_t(p.batch) * p.num_heads;
    Error error =
        launch(attention_dkdv_kernel<DkdvTile>, blocks(p.seqlen_k, DkdvTile::kBlockN) * heads_k,
               DkdvTile::kThreads, DkdvTile::kSharedBytes, stream, p);
    if (error) return error;
    return launch(attention_dq_kernel<DqTile>, blocks(p.seqlen_q, DqTile::kBlockM) * heads_q,
                  DqTile::kThreads, DqTile::kSharedBytes, stream, p);
}

template <class Element, int kHeadDim>
Error attention_dbias(const AttentionBackwardParams& p, Stream stream) {
    using Tile = AttentionDbiasTile<Element, kHeadDim>;
    return launch(attention_dbias_kernel<Tile>, DbiasWork<Tile>::num_tiles(p), Tile::kThreads,
                  Tile::kSharedBytes, stream, p);
}

}  // namespace vlmkernels
