// A panel: query rows whose online softmax runs block of keys by block of keys.
#pragma once

#include "attention/attention_mask_cpu.h"

namespace vlmkernels {
namespace {

struct Panel {
    int64_t begin, rows, cols;          // first row of the problem, rows that exist, vectors
    float* q;                           // as columns: [head_dim, lanes]
    float* out;                         // [head_dim, lanes], to be divided by sum
    bool started = false;               // out holds something
    bool rose = false;                  // a maximum did with the last block
    alignas(64) float max[kMostLanes];  // of the scaled scores so far
    alignas(64) float sum[kMostLanes];
    alignas(64) float rescale[kMostLanes];
    Mask mask;
};

// A panel of rows [begin, end) that has seen no key; fills rows with where they are in q.
template <class T>
void start_panel(Panel& panel, const Problem& problem, int64_t begin, int64_t end, const T** rows) {
    panel.begin = begin;
    panel.rows = end - begin;
    panel.mask.start(problem, begin, end - begin);
    panel.started = false;
    fill(panel.max, panel.max + kMostLanes, -kInfinity);
    fill(panel.sum, panel.sum + kMostLanes, 0.f);
    problem.for_rows(begin, panel.rows, [&](int64_t lane, int64_t token, int64_t head) {
        rows[lane] = problem.query<const T>(problem.p.q, token, head);
    });
}

// Takes the scores of a block, times scale, into the maxima, and scales the sums to them. `base` is
// what to subtract from the scores, times scale and log2 e, before exp2.
template <int kCols>
void raise_max(Panel& panel, const float* scores, int64_t keys, float scale, Vec (&base)[kCols]) {
    for (int c = 0; c < kCols; ++c) base[c] = splat(-kInfinity);
    for (int64_t key = 0; key < keys; ++key)
        for (int c = 0; c < kCols; ++c)
            base[c] = max(base[c], load(scores + (key * kCols + c) * kWidth));
    Vec all = splat(1);
    for (int c = 0; c < kCols; ++c) {
        const int lane = c * kWidth;
        const Vec before = load(panel.max + lane), now = max(before, base[c] * scale);
        base[c] = now == -kInfinity ? Vec{} : now;  // nothing seen yet
        const Vec rescale = exp(before - base[c]);
        store(panel.max + lane, now);
        store(panel.rescale + lane, rescale);
        store(panel.sum + lane, load(panel.sum + lane) * rescale);
        all *= rescale;
        base[c] *= kLog2e;
    }
    panel.rose = !(sum(all) == kWidth);
}

template <int kCols>
void add_sums(Panel& panel, const Vec (&sums)[kCols]) {
    for (int c = 0; c < kCols; ++c) {
        float* sum = panel.sum + c * kWidth;
        store(sum, load(sum) + sums[c]);
    }
}

// The keys that some of the panels may see.
inline Span keys_of(const Panel* panels, int64_t count) {
    Span all = panels[0].mask.keys();
    for (int64_t i = 1; i < count; ++i) {
        const Span keys = panels[i].mask.keys();
        if (keys.size() == 0) continue;
        all = all.size() == 0 ? keys
                              : Span{std::min(all.begin, keys.begin), std::max(all.end, keys.end)};
    }
    return all;
}

// Writes rows of out as T.
template <class T>
void finish_panel_as(Panel& panel, const Problem& problem) {
    const AttentionParams& p = problem.p;
    if (!panel.started) fill(panel.out, panel.out + p.head_dim * panel.cols * kWidth, 0.f);
    alignas(64) float scale[kMostLanes] = {};  // of no row as well: denormal garbage is slow
    T* rows[kMostLanes];
    problem.for_rows(panel.begin, panel.rows, [&](int64_t lane, int64_t token, int64_t head) {
        const float sum = panel.sum[lane];
        scale[lane] = sum == 0 ? 0 : 1 / sum;
        rows[lane] = problem.query<T>(p.out, token, head);
        p.lse[problem.lse_index(token, head)] = panel.max[lane] + std::log(sum);
    });
    transpose_out(panel.out, panel.cols * kWidth, panel.rows, p.head_dim, scale, rows);
}

template <class T>
void finish_panel(Panel& panel, const Problem& problem) {
    problem.p.float32_out ? finish_panel_as<float>(panel, problem)
                          : finish_panel_as<T>(panel, problem);
}

}  // namespace
}  // namespace vlmkernels
