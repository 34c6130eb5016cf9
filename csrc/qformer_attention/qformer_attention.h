// qformer_attention: few queries attend to many tokens x through keys x weight_k^T and values
// x weight_v^T that are never formed (the absorbed form). With the rows q' = q_h weight_k,h of each
// head h, stacked over the heads:
//   scores = softmax_scale q' x^T,  p = softmax(scores),  out_h = (p x)_h weight_v,h^T + bias_v
//   qformer_attention.h        what the kernels are given, and the launch declarations
//   qformer_attention_fwd.cuh  forward: one kernel from q, x and the weights to out
//   qformer_attention_bwd.cuh  backward: three matrix products with x between PyTorch's own
//   qformer_attention.cu       launchers
//   instances/*.cu             one element type each
//   qformer_attention.cpp      argument checks and binding
// On the CPU the same products are PyTorch's own.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/launch.h"

namespace vlmkernels {

inline constexpr int kMaxHeadDim = 128;

struct QFormerAttentionParams {
    const void* q;         // [batch, num_queries, num_heads, head_dim]
    int64_t q_batch_size;  // elements from one image's queries to the next; 0: all have the same
    const void* x;         // [batch, num_tokens, width]
    int64_t x_batch_stride, x_token_stride;
    const void* weight_k;        // [num_heads * head_dim, width]
    const void* weight_v;        // [num_heads * head_dim, width]
    const void* bias_v;          // [num_heads * head_dim] or null
    const int32_t* key_lengths;  // [batch], tokens of each image that exist; null: all
    void* out;                   // [batch, num_queries, num_heads, head_dim]
    float* lse;                  // [batch, num_heads, num_queries]
    int batch, num_queries, num_heads, head_dim, num_tokens, width;
    float softmax_scale;  // > 0
    DType dtype;
};

// Rows of two stacks over x's width: [2, num_heads, batch * num_queries, width], so that PyTorch
// multiplies a head's rows of all images at once. Probabilities are per image:
// p, then ds = softmax_scale * the gradient of the scores, [batch, 2, num_heads * num_queries,
// num_columns], num_columns being num_tokens rounded up to 8 and zeros in the padding.
struct QFormerAttentionBackwardParams {
    const void* x;  // [batch, num_tokens, width]
    int64_t x_batch_stride, x_token_stride;
    const void* rows;            // stacks dy = dout weight_v and q'
    const int32_t* key_lengths;  // [batch] or null
    const float* lse;            // [batch, num_heads, num_queries]
    const float* delta;          // [batch, num_heads, num_queries]: sum(p dp) - dlse
    void* probabilities;         // p and ds
    void* drows;                 // stacks y = p x and dq' = ds x
    void* dx;                    // [batch, num_tokens, width], contiguous; null: not wanted
    int batch, num_queries, num_heads, num_tokens, num_columns, width;
    float softmax_scale;
    DType dtype;
};

Error launch_qformer_attention(const QFormerAttentionParams& p, Stream stream);
Error launch_qformer_attention_backward(const QFormerAttentionBackwardParams& p, Stream stream);

}  // namespace vlmkernels
