// Arguments of the ops that rotate q and k: the heads, and where the angles come from.
#pragma once

#include "binding/tensor.h"
#include "common/rotation.h"

namespace vlmkernels {

// Of the leading dimensions (batch,) token and head of a dense or packed tensor.
HeadStrides head_strides(const Tensor& t);
int64_t num_tokens_of(const Tensor& q);

// q and k are (num_tokens, num_heads, head_dim) or (batch, seqlen, num_heads, head_dim), alike but
// for num_heads.
void expect_heads(const Tensor& q, const Tensor& k);
// out is written like x is read: its shape, dtype and device, heads contiguous, no element twice.
void expect_output_heads(const Tensor& out, const Tensor& x);
// Each dimension must step over all that those of smaller stride span.
void expect_no_overlap(const Tensor& out);
// q and k are written and share no byte. Both have passed expect_no_overlap.
void expect_disjoint(const Tensor& q, const Tensor& k);

// inv_freq float32 and axis int64, both (num_pairs,) and on the CPU, come from ops/rope.py.
Rotation rotation_of_positions(const Tensor& q, const Tensor& position_ids, const Tensor& inv_freq,
                               const Tensor& axis, int num_axes, bool inverse);
Rotation rotation_of_tables(const Tensor& q, const Tensor& cos, const Tensor& sin,
                            int64_t rotary_dim, bool inverse);

}  // namespace vlmkernels
