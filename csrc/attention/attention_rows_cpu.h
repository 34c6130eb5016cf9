// What the backward kernels know of a panel of query rows, and the derivatives of its scores.
#pragma once

#include "attention/attention_mask_cpu.h"

namespace vlmkernels {
namespace {

// Query rows of a problem with all that the backward needs of them.
template <class T>
class Rows {
  public:
    static int64_t memory_size(const AttentionParams& p) {
        return 4 * kPanelRows * round_up(p.head_dim, kWidth);
    }

    Rows(const AttentionBackwardParams& p, float* memory)
        : p_(p), ld_(round_up(p.head_dim, kWidth)) {
        for (float** rows : {&q, &dout, &q_columns_, &dout_columns_}) {
            *rows = memory;
            memory += kPanelRows * ld_;
        }
    }

    // q and dout as rows and as columns, lse and delta of rows [begin, begin + n).
    void load(const Problem& problem, int64_t begin, int64_t n) {
        count = n;
        const float *q_rows[kPanelRows], *dout_rows[kPanelRows];
        fill(lse_, lse_ + kPanelRows, kInfinity);  // p = 0: of no row, or a blind one
        fill(delta_, delta_ + kPanelRows, 0.f);
        mask.start(problem, begin, n);
        problem.for_rows(begin, n, [&](int64_t lane, int64_t token, int64_t head) {
            q_rows[lane] = q + lane * ld_;
            dout_rows[lane] = dout + lane * ld_;
            copy_row(q + lane * ld_, problem.query<const T>(p_.q, token, head), p_.head_dim);
            copy_row(dout + lane * ld_, problem.query<const T>(p_.dout, token, head), p_.head_dim);
            const int64_t at = problem.lse_index(token, head);
            if (p_.lse[at] == -kInfinity) return;  // sees no key: p = 0, whatever dlse is
            lse_[lane] = p_.lse[at];
            delta_[lane] = p_.given_delta
                               ? p_.given_delta[at]
                               : dot(dout_rows[lane], problem.query<const T>(p_.out, token, head)) -
                                     (p_.dlse ? p_.dlse[at] : 0);
        });
        const int64_t lanes = round_up(n, kWidth);
        transpose_in(q_columns_, lanes, n, p_.head_dim, q_rows);
        transpose_in(dout_columns_, lanes, n, p_.head_dim, dout_rows);
    }

    // probabilities and ds, both [keys, lanes], of `keys` rows of k and v that begin with key
    // `first`; ds of the scores after the softcap, whose slopes are given too where there is one.
    template <int kCols>
    void differentiate(const float* k, const float* v, int64_t first, int64_t keys,
                       float* probabilities, float* ds, float* slopes) const {
        constexpr int64_t lanes = kCols * kWidth;
        multiply_columns<kCols, false>(k, ld_, q_columns_, lanes, probabilities, lanes, keys,
                                       p_.head_dim, Assign{});
        multiply_columns<kCols, false>(v, ld_, dout_columns_, lanes, ds, lanes, keys, p_.head_dim,
                                       Assign{});
        mask.prepare<kCols>(probabilities, slopes, first, keys);
        const float scale = Mask::unit(p_) * kLog2e;
        Vec lse[kCols], delta[kCols];
        for (int c = 0; c < kCols; ++c) {
            lse[c] = load_vector(lse_ + c * kWidth) * kLog2e;
            delta[c] = load_vector(delta_ + c * kWidth);
        }
        for (int64_t key = 0; key < keys; ++key)
            for (int c = 0; c < kCols; ++c) {
                const int64_t at = (key * kCols + c) * kWidth;
                const Vec probability = exp2(load_vector(probabilities + at) * scale - lse[c]);
                store(probabilities + at, probability);
                store(ds + at, probability * (load_vector(ds + at) - delta[c]));
            }
    }

    float *q, *dout;  // [count, ld]
    int64_t count = 0;
    Mask mask;

  private:
    static Vec load_vector(const float* from) { return vlmkernels::load(from); }

    float dot(const float* a, const T* b) const {
        Vec total{};
        for (int64_t d = 0; d < p_.head_dim; d += kWidth)
            total += load_vector(a + d) * load_first(b + d, p_.head_dim - d);
        return sum(total);
    }

    const AttentionBackwardParams& p_;
    const int64_t ld_;
    float *q_columns_, *dout_columns_;  // [head_dim, lanes]
    alignas(64) float lse_[kPanelRows], delta_[kPanelRows];
};

// A row of a gradient, as T, or as float where parts of a sum are wanted; row.operator()<U>() is
// where to.
template <class T, class Row>
void store_gradient(const AttentionParams& p, const float* from, float scale, Row&& row) {
    p.float32_out ? store_row(row.template operator()<float>(), from, p.head_dim, scale)
                  : store_row(row.template operator()<T>(), from, p.head_dim, scale);
}

}  // namespace
}  // namespace vlmkernels
