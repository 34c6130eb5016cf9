// Argument checks of attention.cpp and attention_decode.cpp: what passes is a params struct.
#pragma once

#include "attention/attention.h"

namespace vlmkernels {

struct Tensor;

struct ScoreOptions {
    int64_t max_seqlen_q, max_seqlen_k;  // when packed
    int64_t window_left, window_right;
    double softmax_scale, softcap;
};

// The optional tensors of a call.
struct Masks {
    const Tensor &bias, &cu_seqlens_q, &cu_seqlens_k;
    const Tensor &segments_q, &segments_k, &images_q, &images_k, &spans, &id_ranges, &tile_order;
};

int as_int(const Tensor& t, int64_t size);
bool is_half(DType dtype);
// True for the dtypes that a kernel takes: CUDA 16-bit floats; CPU also float32.
bool has_kernel(const Tensor& q);
HeadsView heads_view(const Tensor& t);
void expect_heads_like(const Tensor& t, const Tensor& q);
void expect_lse(const Tensor& lse, const Tensor& q);
void expect_delta(const Tensor& delta, const Tensor& lse);
void expect_result(const Tensor& t, const Tensor& like);
BiasView check_bias(const Tensor& bias, const Tensor& q, const AttentionParams& p);
// paged: k and v are pages, of which there may be any number.
AttentionParams check_qkv(const Tensor& q, const Tensor& k, const Tensor& v, int rank,
                          bool paged = false);
AttentionParams check_inputs(const Tensor& q, const Tensor& k, const Tensor& v, const Masks& masks,
                             const ScoreOptions& options);
void set_scores(AttentionParams& p, const char* op, const ScoreOptions& options);
void set_lse(AttentionParams& p, const Tensor& q, const Tensor& lse);

}  // namespace vlmkernels
