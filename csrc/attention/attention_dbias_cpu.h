// Backward, dbias = ds, summed over what bias is broadcast over: a thread takes a panel of rows of
// dbias and walks over the batch and the heads that share it, in order. q k^T and dout v^T are
// computed again, so that nobody else writes to these rows.
#pragma once

#include "attention/attention_rows_cpu.h"

namespace vlmkernels {
namespace {

template <class T>
class Dbias {
  public:
    static int64_t memory_size(const AttentionBackwardParams& p) {
        const int64_t ld = round_up(p.head_dim, kWidth);
        return Rows<T>::memory_size(p) + 2 * kBlockKeys * (kPanelRows + ld) +
               round_up(p.dbias.seqlen_k, kBlockKeys) * kPanelRows;
    }
    static int64_t num_items(const AttentionBackwardParams& p) {
        return ceil_div(p.dbias.seqlen_q, kPanelRows) * p.dbias.num_heads * p.dbias.batch;
    }

    Dbias(const AttentionBackwardParams& p, float* memory)
        : p_(p), ld_(round_up(p.head_dim, kWidth)), rows_(p, memory) {
        p_scores_ = memory + Rows<T>::memory_size(p);
        ds_ = p_scores_ + kBlockKeys * kPanelRows;
        k_ = ds_ + kBlockKeys * kPanelRows;
        v_ = k_ + kBlockKeys * ld_;
        sum_ = v_ + kBlockKeys * ld_;
    }

    void run(int64_t item) {
        const BiasView& view = p_.dbias;
        const int64_t panels = ceil_div(view.seqlen_q, kPanelRows);
        const int64_t begin = item % panels * kPanelRows;
        const int64_t head = item / panels % view.num_heads, row = item / panels / view.num_heads;
        const Span heads = view.num_heads == 1 ? Span{0, p_.num_heads} : Span{head, head + 1};
        const Span batch = view.batch == 1 ? Span{0, p_.batch} : Span{row, row + 1};
        lanes_ = round_up(std::min(kPanelRows, view.seqlen_q - begin), kWidth);
        fill(sum_, sum_ + round_up(view.seqlen_k, kBlockKeys) * lanes_, 0.f);
        for (int64_t sequence = batch.begin; sequence < batch.end; ++sequence)
            for (int64_t h = heads.begin; h < heads.end; ++h)
                add(Problem(p_, sequence, h / (p_.num_heads / p_.num_heads_k), h, 1), begin);
        dispatch_float(view.dtype, [&]<class U>() {
            store<U>(static_cast<U*>(view.data) + row * view.batch_stride +
                         head * view.head_stride + begin * view.query_stride,
                     std::min(kPanelRows, view.seqlen_q - begin));
        });
    }

  private:
    void add(const Problem& problem, int64_t begin) {
        const int64_t rows = std::min(kPanelRows, problem.seqlen_q - begin);
        if (rows <= 0) return;
        rows_.load(problem, begin, rows);
        const Span span = rows_.mask.keys();
        for (int64_t key = span.begin / kBlockKeys * kBlockKeys; key < span.end;
             key += kBlockKeys) {
            const int64_t keys = std::min(kBlockKeys, span.end - key);
            if (!rows_.mask.sees(key, keys)) continue;
            copy_keys<T>(k_, ld_, problem, p_.k, key, keys);
            copy_keys<T>(v_, ld_, problem, p_.v, key, keys);
            dispatch_cols(ceil_div(rows, kWidth), [&]<int kCols>() {
                rows_.template differentiate<kCols>(k_, v_, key, keys, p_scores_, ds_, nullptr);
                for (int64_t i = 0; i < keys; ++i)
                    for (int c = 0; c < kCols * kWidth; c += kWidth) {
                        float* at = sum_ + (key + i) * lanes_ + c;
                        vlmkernels::store(at, load(at) + load(ds_ + i * kCols * kWidth + c));
                    }
            });
        }
    }

    template <class U>
    void store(U* to, int64_t rows) {
        alignas(64) float ones[kMostLanes];
        fill(ones, ones + kMostLanes, 1.f);
        U* row[kMostLanes];
        for (int64_t i = 0; i < rows; ++i) row[i] = to + i * p_.dbias.query_stride;
        transpose_out(sum_, lanes_, rows, p_.dbias.seqlen_k, ones, row);
    }

    const AttentionBackwardParams& p_;
    const int64_t ld_;
    int64_t lanes_ = 0;
    Rows<T> rows_;
    float *p_scores_, *ds_;  // [keys of a block, lanes]
    float *k_, *v_;          // [keys of a block, ld]
    float* sum_;             // [seqlen_k, lanes]
};

template <class T>
void dbias(const AttentionBackwardParams& p) {
    parallel_take(Dbias<T>::num_items(p), 1, Dbias<T>::memory_size(p),
                  [&](auto&& take, float* memory) {
                      Dbias<T> worker(p, memory);
                      for (int64_t i; (i = take()) >= 0;) worker.run(i);
                  });
}

}  // namespace
}  // namespace vlmkernels
