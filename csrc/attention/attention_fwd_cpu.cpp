// Forward: a thread takes an item of up to kPanels panels of query rows and goes over the blocks of
// keys that they see, so that a block of keys is converted once for all panels and stays in cache.
#include "attention/attention_cpu.h"

namespace vlmkernels {
namespace {

constexpr int kPanels = 4;

struct Panel {
    int64_t begin, rows, cols;          // first row of the problem, rows that exist, vectors
    int64_t fewest_keys, most_keys;     // that a row sees
    float* q;                           // [head_dim, lanes], times softmax_scale / ln 2
    float* out;                         // [head_dim, lanes], to be divided by sum
    bool started = false;               // out holds something
    alignas(64) float max[kPanelRows];  // of the scores in base 2 so far
    alignas(64) float sum[kPanelRows];
    alignas(64) float rescale[kPanelRows];
    alignas(64) int32_t visible[kPanelRows];
};

template <class T>
void start_panel(Panel& panel, const Problem& problem, int64_t begin, int64_t end) {
    panel.begin = begin;
    panel.rows = end - begin;
    panel.cols = ceil_div(panel.rows, kWidth);
    panel.fewest_keys = problem.visible(begin / problem.group);  // rows see ever more keys
    panel.most_keys = problem.visible((end - 1) / problem.group);
    panel.started = false;
    std::fill(panel.max, panel.max + kPanelRows, -kInfinity);
    std::fill(panel.sum, panel.sum + kPanelRows, 0.f);
    const AttentionParams& p = problem.p;
    const T* rows[kPanelRows];
    problem.for_rows(begin, panel.rows, [&](int64_t lane, int64_t token, int64_t head) {
        rows[lane] = problem.query<const T>(p.q, token, head);
        panel.visible[lane] = int32_t(problem.visible(token));
    });
    std::fill(panel.visible + panel.rows, panel.visible + kPanelRows, int32_t(panel.most_keys));
    transpose_in(panel.q, panel.cols * kWidth, panel.rows, p.head_dim, p.softmax_scale * kLog2E,
                 rows);
}

// Scores become probabilities relative to the maximum so far.
template <int kCols>
void softmax(Panel& panel, float* scores, int64_t keys) {
    Vec max_now[kCols], sum_now[kCols];
    for (int c = 0; c < kCols; ++c) max_now[c] = load(panel.max + c * kWidth);
    for (int64_t key = 0; key < keys; ++key)
        for (int c = 0; c < kCols; ++c)
            max_now[c] = max(max_now[c], load(scores + (key * kCols + c) * kWidth));
    for (int c = 0; c < kCols; ++c) {
        const Vec before = load(panel.max + c * kWidth);
        store(panel.max + c * kWidth, max_now[c]);
        max_now[c] = max_now[c] == -kInfinity ? Vec{} : max_now[c];  // nothing seen yet
        store(panel.rescale + c * kWidth, exp2(before - max_now[c]));
        sum_now[c] = Vec{};
    }
    for (int64_t key = 0; key < keys; ++key)
        for (int c = 0; c < kCols; ++c) {
            float* at = scores + (key * kCols + c) * kWidth;
            const Vec probability = exp2(load(at) - max_now[c]);
            store(at, probability);
            sum_now[c] += probability;
        }
    for (int c = 0; c < kCols; ++c) {
        float* sum = panel.sum + c * kWidth;
        store(sum, load(sum) * load(panel.rescale + c * kWidth) + sum_now[c]);
    }
}

template <int kCols>
void attend(Panel& panel, const float* k, const float* v, int64_t first_key, int64_t keys,
            int64_t head_dim, float* scores) {
    const int64_t ld = round_up(head_dim, kWidth);
    constexpr int64_t lanes = kCols * kWidth;
    multiply_columns<kCols, false>(k, ld, panel.q, lanes, scores, lanes, keys, head_dim, Assign{});
    if (first_key + keys > panel.fewest_keys)
        mask_scores<kCols>(scores, first_key, keys, panel.visible);
    softmax<kCols>(panel, scores, keys);
    auto accumulate = [&](auto finish) {
        multiply_columns<kCols, true>(v, ld, scores, lanes, panel.out, lanes, head_dim, keys,
                                      finish);
    };
    panel.started ? accumulate(ScaleAndAdd{panel.rescale}) : accumulate(Assign{});
    panel.started = true;
}

template <class T>
void finish_panel(Panel& panel, const Problem& problem) {
    const AttentionParams& p = problem.p;
    if (!panel.started) std::fill(panel.out, panel.out + p.head_dim * panel.cols * kWidth, 0.f);
    alignas(64) float scale[kPanelRows];
    T* rows[kPanelRows];
    problem.for_rows(panel.begin, panel.rows, [&](int64_t lane, int64_t token, int64_t head) {
        const float sum = panel.sum[lane];
        scale[lane] = sum == 0 ? 0 : 1 / sum;
        rows[lane] = problem.query<T>(p.out, token, head);
        p.lse[problem.lse_index(token, head)] = panel.max[lane] * kLn2 + std::log(sum);
    });
    transpose_out(panel.out, panel.cols * kWidth, panel.rows, p.head_dim, scale, rows);
}

template <class T>
class Forward {
  public:
    explicit Forward(const AttentionParams& p)
        : p_(p),
          ld_(round_up(p.head_dim, kWidth)),
          buffer_(2 * kPanels * kPanelRows * ld_ + 2 * kBlockKeys * ld_ + kBlockKeys * kPanelRows) {
        float* at = buffer_.data();
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
            start_panel<T>(panels_[count++], problem, begin, std::min(begin + step, item.end));
        const int64_t most_keys = panels_[count - 1].most_keys;
        for (int64_t key = 0; key < most_keys; key += kBlockKeys)
            attend_block(problem, count, key, std::min(kBlockKeys, most_keys - key));
        for (int64_t i = 0; i < count; ++i) finish_panel<T>(panels_[i], problem);
    }

  private:
    void attend_block(const Problem& problem, int64_t count, int64_t key, int64_t keys) {
        copy_rows(k_, ld_, problem.key<const T>(p_.k, key), p_.k.token_stride, keys, p_.head_dim);
        copy_rows(v_, ld_, problem.key<const T>(p_.v, key), p_.v.token_stride, keys, p_.head_dim);
        for (int64_t i = 0; i < count; ++i)
            if (key < panels_[i].most_keys)
                dispatch_cols(panels_[i].cols, [&]<int kCols>() {
                    attend<kCols>(panels_[i], k_, v_, key, keys, p_.head_dim, scores_);
                });
    }

    const AttentionParams& p_;
    const int64_t ld_;
    Buffer buffer_;
    Panel panels_[kPanels];
    float *k_, *v_, *scores_;
};

}  // namespace

template <class Isa>
void attention_fwd_cpu(const AttentionParams& p) {
    dispatch_float(p.dtype, [&]<class T>() {
        const std::vector<Item> items = make_items(p, kPanels * kPanelRows);
        parallel_take(int64_t(items.size()), grain_of(items, p.head_dim), [&](auto&& take) {
            Forward<T> forward(p);
            for (int64_t i; (i = take()) >= 0;) forward.run(items[i]);
        });
    });
}

template void attention_fwd_cpu<VLMKERNELS_ISA>(const AttentionParams& p);

}  // namespace vlmkernels
