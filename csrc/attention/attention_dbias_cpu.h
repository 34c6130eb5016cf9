// Backward, dbias = ds, summed over what bias is broadcast over: added while ds is at hand. Those
// who add to the same rows do so in turn (see tasks in attention_bwd_cpu.cpp), in fp32.
#pragma once

#include <optional>

#include "attention/attention_rows_cpu.h"

namespace vlmkernels {
namespace {

// How the key heads and sequences of a problem share the rows of dbias.
inline bool shares_batch(const AttentionBackwardParams& p) {
    return p.dbias.data && p.dbias.batch == 1 && p.batch > 1;
}
inline bool shares_heads(const AttentionBackwardParams& p) {
    return p.dbias.data && p.dbias.num_heads == 1 && p.num_heads > 1;
}

// All of dbias, in memory of its own where sums must not be rounded on the way.
class BiasGradient {
  public:
    explicit BiasGradient(const AttentionBackwardParams& p) : p_(p), view(p.dbias) {
        if (!view.data) return;
        size_ = int64_t(view.batch) * view.num_heads * view.seqlen_q * view.seqlen_k;
        if (view.dtype != DType::kFloat32 && (shares_batch(p) || shares_heads(p))) {
            sums_.emplace(size_);
            view.data = sums_->data();
            view.dtype = DType::kFloat32;
        }
        if (p.batch && !p.cu_seqlens_q) return;  // every row is one of some sequence
        dispatch_float(view.dtype, [&]<class U>() {
            parallel_for(size_, 1 << 16, [&](int64_t begin, int64_t end) {
                fill(static_cast<U*>(view.data) + begin, static_cast<U*>(view.data) + end, U{});
            });
        });
    }
    void finish() {
        if (!sums_) return;
        dispatch_float(p_.dbias.dtype, [&]<class U>() {
            parallel_for(size_, 1 << 16, [&](int64_t begin, int64_t end) {
                for_each_vector(begin, end, [&](int64_t i, int count) VLMKERNELS_INLINED {
                    store_first(static_cast<U*>(p_.dbias.data) + i,
                                load_first(sums_->data() + i, count), count);
                });
            });
        });
    }

  private:
    const AttentionBackwardParams& p_;
    int64_t size_ = 0;
    std::optional<Buffer> sums_;

  public:
    BiasView view;
};

// The rows of dbias that belong to a panel of query rows.
class BiasGradientRows {
  public:
    // Those that are met for the first time become zero.
    void start(const BiasView& view, const Problem& problem, int64_t begin, int64_t rows) {
        view_ = view;
        rows_ = rows;
        problem.for_rows(begin, rows, [&](int64_t lane, int64_t token, int64_t head) {
            head += problem.first_head;
            at_[lane] = problem.sequence * view.batch_stride + head * view.head_stride +
                        token * view.query_stride;
            const bool first =
                (view.batch > 1 || problem.sequence == 0) && (view.num_heads > 1 || head == 0);
            if (!first) return;
            dispatch_float(view.dtype, [&]<class U>() {
                U* row = static_cast<U*>(view.data) + at_[lane];
                fill(row, row + view.seqlen_k, U{});
            });
        });
    }

    // ds[keys, lanes] of keys from `first` on; its rows are whole blocks of kWidth.
    void add(const float* ds, int64_t lanes, int64_t first, int64_t keys) const {
        dispatch_float(view_.dtype, [&]<class U>() {
            for (int64_t lane = 0; lane < rows_; lane += kWidth)
                for (int64_t key = 0; key < keys; key += kWidth) {
                    Vec m[kWidth];
                    for (int i = 0; i < kWidth; ++i) m[i] = load(ds + (key + i) * lanes + lane);
                    transpose(m);
                    for (int i = 0; i < kWidth && lane + i < rows_; ++i) {
                        U* at = static_cast<U*>(view_.data) + at_[lane + i] + first + key;
                        store_first(at, load_first(at, keys - key) + m[i], keys - key);
                    }
                }
        });
    }

  private:
    BiasView view_{};
    int64_t rows_ = 0;
    int64_t at_[kMostLanes];  // offset of each row
};

}  // namespace
}  // namespace vlmkernels
