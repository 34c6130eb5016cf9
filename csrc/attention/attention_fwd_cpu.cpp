// Forward: a thread takes an item of up to kPanels panels of query rows and goes over the blocks of
// keys that they see, so that a block of keys is converted once for all panels and stays in cache.
#include "attention/attention_amx_cpu.h"
#include "attention/attention_panel_cpu.h"

namespace vlmkernels {
namespace {

constexpr int kPanels = 4;

// Scores become probabilities relative to the maximum so far.
template <int kCols>
void softmax(Panel& panel, float* scores, int64_t keys, float unit) {
    const float scale = unit * kLog2e;
    Vec base[kCols], sums[kCols] = {};
    raise_max(panel, scores, keys, unit, base);
    for (int64_t key = 0; key < keys; ++key)
        for (int c = 0; c < kCols; ++c) {
            float* at = scores + (key * kCols + c) * kWidth;
            const Vec probability = exp2(load(at) * scale - base[c]);
            store(at, probability);
            sums[c] += probability;
        }
    add_sums(panel, sums);
}

template <int kCols>
void attend(const AttentionParams& p, Panel& panel, const float* k, const float* v,
            int64_t first_key, int64_t keys, float* scores) {
    const int64_t head_dim = p.head_dim, ld = round_up(head_dim, kWidth);
    constexpr int64_t lanes = kCols * kWidth;
    multiply_columns<kCols, false>(k, ld, panel.q, lanes, scores, lanes, keys, head_dim, Assign{});
    panel.mask.prepare<kCols>(scores, nullptr, first_key, keys);
    softmax<kCols>(panel, scores, keys, Mask::unit(p));
    auto accumulate = [&](auto finish) {
        multiply_columns<kCols, true>(v, ld, scores, lanes, panel.out, lanes, head_dim, keys,
                                      finish);
    };
    panel.started ? accumulate(ScaleAndAdd{panel.rescale}) : accumulate(Assign{});
    panel.started = true;
}

template <class T>
class Forward {
  public:
    static int64_t memory_size(const AttentionParams& p) {
        const int64_t ld = round_up(p.head_dim, kWidth);
        return 2 * kPanels * kPanelRows * ld + 2 * kBlockKeys * ld + kBlockKeys * kPanelRows;
    }

    Forward(const AttentionParams& p, float* memory) : p_(p), ld_(round_up(p.head_dim, kWidth)) {
        float* at = memory;
        for (Panel& panel : panels_) {
            panel.q = at;
            panel.out = at + kPanelRows * ld_;
            at += 2 * kPanelRows * ld_;
        }
        k_ = at;
        v_ = k_ + kBlockKeys * ld_;
        scores_ = v_ + kBlockKeys * ld_;
    }

    void run(const Item& item) {
        const Problem problem(p_, item.sequence, item.head_k);
        const int64_t parts = ceil_div(item.end - item.begin, kPanelRows);
        const int64_t step = round_up(ceil_div(item.end - item.begin, parts), kWidth);
        int64_t count = 0;
        for (int64_t begin = item.begin; begin < item.end; begin += step)
            start(panels_[count++], problem, begin, std::min(begin + step, item.end));
        const Span span = keys_of(panels_, count);
        for (int64_t key = span.begin / kBlockKeys * kBlockKeys; key < span.end; key += kBlockKeys)
            attend_block(problem, count, key, std::min(kBlockKeys, span.end - key));
        for (int64_t i = 0; i < count; ++i) finish_panel<T>(panels_[i], problem);
    }

  private:
    void start(Panel& panel, const Problem& problem, int64_t begin, int64_t end) {
        const T* rows[kMostLanes];
        start_panel(panel, problem, begin, end, rows);
        panel.cols = ceil_div(panel.rows, kWidth);
        transpose_in(panel.q, panel.cols * kWidth, panel.rows, p_.head_dim, rows);
    }

    void attend_block(const Problem& problem, int64_t count, int64_t key, int64_t keys) {
        bool copied = false;
        for (int64_t i = 0; i < count; ++i) {
            if (!panels_[i].mask.sees(key, keys)) continue;
            if (!copied) {
                copy_keys<T>(k_, ld_, problem, p_.k, key, keys);
                copy_keys<T>(v_, ld_, problem, p_.v, key, keys);
                copied = true;
            }
            dispatch_cols(panels_[i].cols, [&]<int kCols>() {
                attend<kCols>(p_, panels_[i], k_, v_, key, keys, scores_);
            });
        }
    }

    const AttentionParams& p_;
    const int64_t ld_;
    Panel panels_[kPanels];
    float *k_, *v_, *scores_;
};

}  // namespace

template <class Isa>
void attention_fwd_cpu(const AttentionParams& p) {
    if (attention_fwd_amx(p)) return;
    dispatch_float(p.dtype, [&]<class T>() {
        const std::vector<Item> items = make_items(p, kPanels * kPanelRows);
        parallel_take(int64_t(items.size()), grain_of(items, p.head_dim),
                      Forward<T>::memory_size(p), [&](auto&& take, float* memory) {
                          Forward<T> forward(p, memory);
                          for (int64_t i; (i = take()) >= 0;) forward.run(items[i]);
                      });
    });
}

template void attention_fwd_cpu<VLMKERNELS_ISA>(const AttentionParams& p);

}  // namespace vlmkernels
