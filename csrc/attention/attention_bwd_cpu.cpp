// Backward: a thread takes the query rows of one key head, a panel at a time, and accumulates dk
// and dv in memory that no other thread touches; dq of a panel is complete when the panel is. If
// there are too few heads for the threads, the rows of a head are cut into parts, each with its own
// dk and dv, which are added up in order at the end: no atomics, and for a given number of threads
// always the same result. dbias is added to by the way.
//   p = exp(scores - lse),  ds = p (dout v^T - delta),  delta = rowsum(out dout) - dlse
//   dv = p^T dout,  dk = scale ds^T q,  dq = scale ds k
#include "attention/attention_dbias_cpu.h"

namespace vlmkernels {
namespace {

// Rows of a problem that one thread takes, and where their share of dk and dv goes.
struct Part {
    Item item;
    int64_t keys;              // that its rows see
    float* partial = nullptr;  // dk, dv [padded_keys, ld]; null: the only part of its problem
};

constexpr int64_t kMostParts = 16;

// Memory for the key side of a part: rounded up for whole tiles.
int64_t padded_keys(int64_t keys) { return round_up(keys, kTileRows); }

template <class T>
class Backward {
  public:
    static int64_t memory_size(const AttentionBackwardParams& p, int64_t most_keys) {
        const int64_t ld = round_up(p.head_dim, kWidth);
        return Rows<T>::memory_size(p) + kPanelRows * ld + 3 * kBlockKeys * kPanelRows +
               4 * padded_keys(most_keys) * ld;
    }

    Backward(const AttentionBackwardParams& p, const BiasView& dbias, float* memory)
        : p_(p), dbias_(dbias), ld_(round_up(p.head_dim, kWidth)), rows_(p, memory) {
        dq_ = memory + Rows<T>::memory_size(p);
        p_scores_ = dq_ + kPanelRows * ld_;
        ds_ = p_scores_ + kBlockKeys * kPanelRows;
        slopes_ = ds_ + kBlockKeys * kPanelRows;
        k_ = slopes_ + kBlockKeys * kPanelRows;
    }

    void run(const Part& part) {
        const Problem problem(p_, part.item.sequence, part.item.head_k);
        const int64_t size = padded_keys(part.keys) * ld_;
        v_ = k_ + size;
        dk_ = part.partial ? part.partial : v_ + size;
        dv_ = dk_ + size;
        copy_keys<T>(k_, ld_, problem, p_.k, 0, part.keys);
        copy_keys<T>(v_, ld_, problem, p_.v, 0, part.keys);
        fill(dk_, dk_ + 2 * size, 0.f);
        for (int64_t row = part.item.begin; row < part.item.end; row += kPanelRows)
            run_panel(problem, row, std::min(kPanelRows, part.item.end - row));
        if (!part.partial) store_keys(problem, part.keys);
    }

  private:
    void run_panel(const Problem& problem, int64_t begin, int64_t rows) {
        rows_.load(problem, begin, rows);
        if (dbias_.data) bias_rows_.start(dbias_, problem, begin, rows);
        fill(dq_, dq_ + kPanelRows * ld_, 0.f);
        const Span span = rows_.mask.keys();
        for (int64_t key = span.begin / kBlockKeys * kBlockKeys; key < span.end;
             key += kBlockKeys) {
            const int64_t keys = round_up(std::min(kBlockKeys, span.end - key), kTileRows);
            if (rows_.mask.sees(key, keys))
                dispatch_cols(ceil_div(rows, kWidth), [&]<int kCols>() {
                    run_block<kCols>(key, keys, std::min(keys, problem.seqlen_k - key));
                });
        }
        problem.for_rows(begin, rows, [&](int64_t lane, int64_t token, int64_t head) {
            store_gradient<T>(p_, dq_ + lane * ld_, p_.softmax_scale,
                              [&]<class U>() { return problem.query<U>(p_.dq, token, head); });
        });
    }

    // keys: rounded up to whole tiles, of which `existing` exist.
    template <int kCols>
    void run_block(int64_t key, int64_t keys, int64_t existing) {
        constexpr int64_t lanes = kCols * kWidth;
        const int64_t at = key * ld_, vectors = ld_ / kWidth;
        const bool capped = p_.softcap > 0;
        rows_.template differentiate<kCols>(k_ + at, v_ + at, key, keys, p_scores_, ds_,
                                            capped ? slopes_ : nullptr);
        if (dbias_.data) bias_rows_.add(ds_, lanes, key, existing);
        for (int64_t i = 0; capped && i < keys * lanes; i += kWidth)
            store(ds_ + i, load(ds_ + i) * load(slopes_ + i));
        multiply_add<false>(p_scores_, lanes, rows_.dout, ld_, dv_ + at, ld_, keys, rows_.count,
                            vectors);
        multiply_add<false>(ds_, lanes, rows_.q, ld_, dk_ + at, ld_, keys, rows_.count, vectors);
        multiply_add<true>(ds_, lanes, k_ + at, ld_, dq_, ld_, rows_.count, keys, vectors);
    }

    void store_keys(const Problem& problem, int64_t keys) {
        for (int64_t key = 0; key < keys; ++key) {
            store_gradient<T>(p_, dk_ + key * ld_, p_.softmax_scale,
                              [&]<class U>() { return problem.key<U>(p_.dk, key); });
            store_gradient<T>(p_, dv_ + key * ld_, 1,
                              [&]<class U>() { return problem.key<U>(p_.dv, key); });
        }
    }

    const AttentionBackwardParams& p_;
    const BiasView dbias_;
    const int64_t ld_;
    Rows<T> rows_;
    BiasGradientRows bias_rows_;
    float* dq_;                        // [rows, ld]
    float *p_scores_, *ds_, *slopes_;  // [keys of a block, lanes]
    float *k_, *v_, *dk_, *dv_;        // [keys, ld]
};

// How many rows of a problem with so many rows and keys are a part. It is cut into equal ones if
// its cost is above the limit.
int64_t part_rows(int64_t rows, int64_t keys, double limit) {
    const double cost = double(rows) * double(keys);
    const int64_t wanted = cost > limit ? int64_t(std::ceil(cost / limit)) : 1;
    const int64_t panels = ceil_div(ceil_div(rows, kPanelRows), std::min(wanted, kMostParts));
    return std::max<int64_t>(1, panels) * kPanelRows;
}

void cut(const Problem& problem, int64_t step, std::vector<Part>& parts) {
    const int64_t rows = problem.rows();
    for (int64_t begin = 0; begin == 0 || begin < rows; begin += step) {
        const int64_t end = std::min(begin + step, rows);
        const int64_t keys = end < rows ? problem.keys_of(begin, end).end : problem.seqlen_k;
        parts.push_back({{int32_t(problem.sequence), int32_t(problem.head_k), begin, end,
                          double(end - begin) * double(keys)},
                         keys});
    }
}

// The parts of all problems, those of a problem side by side. A problem, or those that share rows
// of dbias, is cut if it is more than half of what each thread would do.
std::vector<Part> make_parts(const AttentionBackwardParams& p) {
    double total = 0;
    for (int i = 0; i < p.batch; ++i) {
        const Problem problem(p, i, 0);
        total += double(problem.rows()) * double(problem.seqlen_k) * p.num_heads_k;
    }
    const int64_t threads = max_threads(), group = p.num_heads / p.num_heads_k;
    const int64_t sharing = (shares_batch(p) ? p.batch : 1) * (shares_heads(p) ? p.num_heads_k : 1);
    const double limit = threads == 1 ? total : total / double(2 * threads * sharing);
    std::vector<Part> parts;
    for (int i = 0; i < p.batch; ++i)
        for (int head_k = 0; head_k < p.num_heads_k; ++head_k) {
            const Problem problem(p, i, head_k);
            // Where rows are shared, all are cut at the same tokens.
            int64_t step = sharing > 1 ? part_rows(p.seqlen_q * group, p.seqlen_k, limit)
                                       : part_rows(problem.rows(), problem.seqlen_k, limit);
            if (shares_heads(p)) step = round_up(step, group);
            cut(problem, step, parts);
        }
    return parts;
}

bool same_problem(const Part& a, const Part& b) {
    return a.item.sequence == b.item.sequence && a.item.head_k == b.item.head_k;
}

// Calls f(first, count) for the parts of each problem that has several.
template <class F>
void for_cut_problems(std::vector<Part>& parts, F&& f) {
    for (size_t first = 0, end; first < parts.size(); first = end) {
        end = first + 1;
        while (end < parts.size() && same_problem(parts[first], parts[end])) ++end;
        if (end - first > 1) f(&parts[first], int64_t(end - first));
    }
}

// dk and dv of a problem: the sum over its parts, in order.
template <class T>
void add_partials(const AttentionBackwardParams& p, const Part* parts, int64_t count) {
    const Problem problem(p, parts->item.sequence, parts->item.head_k);
    const int64_t ld = round_up(p.head_dim, kWidth);
    parallel_for(problem.seqlen_k, 64, [&](int64_t begin, int64_t end) {
        alignas(64) float sum[kMaxHeadDim];
        for (int64_t key = begin; key < end; ++key)
            for (bool is_dv : {false, true}) {
                fill(sum, sum + ld, 0.f);
                for (const Part* part = parts; part < parts + count; ++part) {
                    if (key >= part->keys) continue;
                    const float* row = part->partial + (is_dv * padded_keys(part->keys) + key) * ld;
                    for (int64_t d = 0; d < ld; ++d) sum[d] += row[d];
                }
                store_gradient<T>(p, sum, is_dv ? 1 : p.softmax_scale, [&]<class U>() {
                    return problem.key<U>(is_dv ? p.dv : p.dk, key);
                });
            }
    });
}

// Parts that one thread takes in turn: those that add to the same rows of dbias.
struct Task {
    std::vector<const Part*> parts;
    double cost = 0;
};

// Costliest first.
std::vector<Task> make_tasks(const AttentionBackwardParams& p, const std::vector<Part>& parts) {
    auto before = [&](const Part* a, const Part* b) {
        const Item &x = a->item, &y = b->item;
        if (x.sequence != y.sequence && !shares_batch(p)) return x.sequence < y.sequence;
        if (x.head_k != y.head_k && !shares_heads(p)) return x.head_k < y.head_k;
        return x.begin < y.begin;
    };
    std::vector<const Part*> order;
    for (const Part& part : parts) order.push_back(&part);
    std::stable_sort(order.begin(), order.end(), before);
    std::vector<Task> tasks;
    for (const Part* part : order) {
        if (tasks.empty() || before(tasks.back().parts[0], part)) tasks.emplace_back();
        tasks.back().parts.push_back(part);
        tasks.back().cost += part->item.cost;
    }
    std::stable_sort(tasks.begin(), tasks.end(),
                     [](const Task& a, const Task& b) { return a.cost > b.cost; });
    return tasks;
}

template <class T>
void backward(const AttentionBackwardParams& p) {
    const int64_t ld = round_up(p.head_dim, kWidth);
    std::vector<Part> parts = make_parts(p);
    int64_t size = 0, most_keys = 0;
    for_cut_problems(parts, [&](Part* part, int64_t count) {
        for (Part* end = part + count; part < end; ++part) size += 2 * padded_keys(part->keys) * ld;
    });
    Buffer partials(size);
    float* at = partials.data();
    for_cut_problems(parts, [&](Part* part, int64_t count) {
        for (Part* end = part + count; part < end; ++part) {
            part->partial = at;
            at += 2 * padded_keys(part->keys) * ld;
        }
    });
    for (const Part& part : parts) most_keys = std::max(most_keys, part.keys);
    const std::vector<Task> tasks = make_tasks(p, parts);
    BiasGradient dbias(p);
    parallel_take(int64_t(tasks.size()), grain_of(tasks, p.head_dim),
                  Backward<T>::memory_size(p, most_keys), [&](auto&& take, float* memory) {
                      Backward<T> worker(p, dbias.view, memory);
                      for (int64_t i; (i = take()) >= 0;)
                          for (const Part* part : tasks[i].parts) worker.run(*part);
                  });
    for_cut_problems(parts, [&](Part* part, int64_t count) { add_partials<T>(p, part, count); });
    dbias.finish();
}

}  // namespace

template <class Isa>
void attention_bwd_cpu(const AttentionBackwardParams& p) {
    dispatch_float(p.dtype, [&]<class T>() { backward<T>(p); });
}

template void attention_bwd_cpu<VLMKERNELS_ISA>(const AttentionBackwardParams& p);

}  // namespace vlmkernels
