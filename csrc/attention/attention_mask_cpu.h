// What happens to the scores of a panel between q k^T and softmax: scale, softcap, bias, and -inf
// for keys that a row does not see. Scores are [keys, lanes], a lane for each row.
#pragma once

#include <type_traits>

#include "attention/attention_cpu.h"

namespace vlmkernels {
namespace {

// The odd polynomial is Cephes' tanhf: for small x the other form would cancel.
VLMKERNELS_INLINE Vec tanh(Vec x) {
    const Bits sign = (Bits)x & 0x80000000u;
    const Vec size = (Vec)((Bits)x ^ sign), z = x * x;
    Vec small = z * -5.70498872745e-3f + 2.06390887954e-2f;
    small = small * z - 5.37397155531e-2f;
    small = small * z + 1.33314422036e-1f;
    small = small * z - 3.33332819422e-1f;
    small = small * z * x + x;
    const Vec large = 1.f - 2.f / (exp(-max(size * -2.f, splat(-80.f))) + 1.f);
    return size < 0.625f ? small : (Vec)((Bits)large | sign);
}

struct IdRange {
    int32_t min = std::numeric_limits<int32_t>::max(), max = std::numeric_limits<int32_t>::min();

    void add(int32_t id) { min = id < min ? id : min, max = id > max ? id : max; }
    bool meets(const IdRange& other) const { return min <= other.max && other.min <= max; }
};

class Mask {
  public:
    // By what prepared scores are still to be multiplied.
    static float unit(const AttentionParams& p) { return p.plain() ? p.softmax_scale : 1; }

    // For rows [begin, begin + rows) of a problem.
    void start(const Problem& problem, int64_t begin, int64_t rows) {
        const AttentionParams& p = problem.p;
        problem_ = &problem;
        rows_ = rows;
        span_ = problem.keys_of(begin, begin + rows);
        const int64_t first = begin / problem.group, last = (begin + rows - 1) / problem.group;
        whole_ = {problem.window(last).begin, problem.window(first).end};  // windows move on
        segments_ = images_ = {};
        const int32_t *segments = problem.ids_q(p.segments.q), *images = problem.ids_q(p.images.q);
        problem.for_rows(begin, rows, [&](int64_t lane, int64_t token, int64_t head) {
            const Span window = problem.window(token);
            begin_[lane] = int32_t(window.begin);
            end_[lane] = int32_t(window.end);
            if (p.spans)
                whole_ = {std::max(whole_.begin, window.begin), std::min(whole_.end, window.end)};
            segment_[lane] = segments ? segments[token] : 0;
            image_[lane] = images ? images[token] : -1;
            if (segments) segments_.add(segment_[lane]);
            if (image_[lane] >= 0) images_.add(image_[lane]);
            bias_[lane] = (problem.first_head + head) * p.bias.head_stride +
                          token * p.bias.query_stride + problem.sequence * p.bias.batch_stride;
        });
        fill(begin_ + rows, begin_ + kMostLanes, 0);
        fill(end_ + rows, end_ + kMostLanes, int32_t(span_.end));
        fill(segment_ + rows, segment_ + kMostLanes, segment_[0]);
        fill(image_ + rows, image_ + kMostLanes, -1);
    }

    Span keys() const { return span_; }

    // Does some row see one of these keys?
    bool sees(int64_t first, int64_t keys) const {
        if (first >= span_.end || first + keys <= span_.begin) return false;
        const AttentionParams& p = problem_->p;
        if (!p.has_ids()) return true;
        if (p.spans) return in_windows(first, keys);
        IdRange segments, images;
        const int64_t end = std::min(first + keys, problem_->seqlen_k);
        const int32_t *of_segment = problem_->ids_k(p.segments.k),
                      *of_image = problem_->ids_k(p.images.k);
        for (int64_t key = first; key < end; ++key) {
            if (of_segment) segments.add(of_segment[key]);
            if (of_image && of_image[key] >= 0) images.add(of_image[key]);
        }
        if (of_segment && !segments.meets(segments_)) return false;
        return !of_image || in_windows(first, keys) || images.meets(images_);
    }

    // scores of [first, first + keys): ready for softmax up to unit(). slopes, if given: those of
    // the softcap.
    template <int kCols>
    void prepare(float* scores, float* slopes, int64_t first, int64_t keys) const {
        const AttentionParams& p = problem_->p;
        if (!p.plain()) {
            const bool capped = p.softcap > 0;
            if (capped || !p.bias.data) scale<kCols>(scores, slopes, keys);
            if (p.bias.data) add_bias<kCols>(scores, capped ? 1 : p.softmax_scale, first, keys);
        }
        const bool ids = p.segments.q || p.images.q;
        if (!ids && (first >= whole_.begin && first + keys <= whole_.end)) return;
        ids ? hide<kCols, true>(scores, first, keys) : hide<kCols, false>(scores, first, keys);
    }

  private:
    bool in_windows(int64_t first, int64_t keys) const {
        for (int64_t lane = 0; lane < rows_; ++lane)
            if (first < end_[lane] && first + keys > begin_[lane]) return true;
        return false;
    }

    template <int kCols>
    void scale(float* scores, float* slopes, int64_t keys) const {
        const float scale = problem_->p.softmax_scale, softcap = problem_->p.softcap;
        for (int64_t i = 0; i < keys * kCols; ++i) {
            float* at = scores + i * kWidth;
            if (softcap == 0) {
                store(at, load(at) * scale);
                continue;
            }
            const Vec ratio = tanh(load(at) * (scale / softcap));
            store(at, ratio * softcap);
            if (slopes) store(slopes + i * kWidth, 1.f - ratio * ratio);
        }
    }

    // scores * scale + bias, a block of kWidth keys and rows at a time. Writes whole blocks.
    template <int kCols>
    void add_bias(float* scores, float scale, int64_t first, int64_t keys) const {
        constexpr int64_t lanes = kCols * kWidth;
        const int64_t existing = std::min(keys, problem_->seqlen_k - first);
        dispatch_float(problem_->p.bias.dtype, [&]<class T>() {
            const T* bias = static_cast<const T*>(problem_->p.bias.data) + first;
            for (int64_t lane = 0; lane < lanes; lane += kWidth)
                for (int64_t key = 0; key < existing; key += kWidth) {
                    if constexpr (std::is_same_v<T, BFloat16>)
                        if (lane + kWidth <= rows_ && key + 2 * kWidth <= existing) {
                            add_pairs(scores + key * lanes + lane, lanes, scale, bias + key, lane);
                            key += kWidth;
                            continue;
                        }
                    Vec m[kWidth];
                    load_bias(m, bias + key, lane, existing - key, keys);
                    transpose(m);
#pragma GCC unroll 16
                    for (int i = 0; i < kWidth; ++i) {
                        float* at = scores + (key + i) * lanes + lane;
                        store(at, load(at) * scale + m[i]);
                    }
                }
        });
    }

    // The same for bfloat16, 2 kWidth keys at once: they are turned as pairs.
    VLMKERNELS_INLINE void add_pairs(float* scores, int64_t lanes, float scale,
                                     const BFloat16* bias, int64_t lane) const {
        Vec m[kWidth];
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i)
            m[i] = load(reinterpret_cast<const float*>(bias + bias_[lane + i]));
        transpose(m);
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i, scores += 2 * lanes) {
            const Bits pairs = (Bits)m[i];
            store(scores, load(scores) * scale + (Vec)(pairs << 16));
            store(scores + lanes, load(scores + lanes) * scale + (Vec)(pairs & 0xffff0000u));
        }
    }

    // m[i, key]: bias of row lane + i; zero where there is no such row or key.
    template <class T>
    VLMKERNELS_INLINE void load_bias(Vec (&m)[kWidth], const T* bias, int64_t lane,
                                     int64_t existing, int64_t ahead) const {
        const bool whole = lane + kWidth <= rows_ && existing >= kWidth;
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) {
            if (whole) {
                const T* at = bias + bias_[lane + i];
                __builtin_prefetch(at + ahead);  // of the next block
                m[i] = load(at);
            } else {
                m[i] = lane + i < rows_ ? load_first(bias + bias_[lane + i], existing) : Vec{};
            }
        }
    }

    template <int kCols, bool kIds>
    void hide(float* scores, int64_t first, int64_t keys) const {
        const int32_t* segments = problem_->ids_k(problem_->p.segments.k);
        const int32_t* images = problem_->ids_k(problem_->p.images.k);
        for (int64_t i = 0; i < keys; ++i) {
            const int32_t key = int32_t(first + i);
            const bool exists = key < problem_->seqlen_k;
            const int32_t segment = kIds && segments && exists ? segments[key] : 0;
            const int32_t image = kIds && images && exists ? images[key] : -1;
            for (int c = 0; c < kCols; ++c) {
                const Ints is = Ints{} + key;
                Ints seen = (ints(begin_, c) <= is) & (is < ints(end_, c));
                if (kIds && image >= 0) seen |= ints(image_, c) == Ints{} + image;
                if (kIds && segments && exists) seen &= ints(segment_, c) == Ints{} + segment;
                float* at = scores + (i * kCols + c) * kWidth;
                store(at, seen ? load(at) : splat(-kInfinity));
            }
        }
    }

    static VLMKERNELS_INLINE Ints ints(const int32_t* of_lanes, int c) {
        Ints x;
        std::memcpy(&x, of_lanes + c * kWidth, sizeof x);
        return x;
    }

    const Problem* problem_ = nullptr;
    int64_t rows_ = 0;
    Span span_{}, whole_{};      // keys that some row may see, that are in every row's window
    IdRange segments_, images_;  // of the rows
    alignas(64) int32_t begin_[kMostLanes], end_[kMostLanes];  // the window of each row
    alignas(64) int32_t segment_[kMostLanes], image_[kMostLanes];
    int64_t bias_[kMostLanes];  // offset of each row of bias
};

}  // namespace
}  // namespace vlmkernels
