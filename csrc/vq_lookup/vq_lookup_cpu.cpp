// The method of vq_lookup.h in fp32: a thread takes a block of tokens and walks over the codebook,
// a panel of codes at a time, each panel turned so that a vector holds one column of several codes.
#include <cmath>
#include <cstdlib>
#include <limits>
#include <new>

#include "common/gemm_cpu.h"
#include "vq_lookup/vq_lookup.h"

namespace vlmkernels {
namespace {

constexpr int kPanel = kTileCols * kWidth;  // codes
constexpr int kSlots = 16;                  // candidates of a token
constexpr float kInfinity = std::numeric_limits<float>::infinity();

bool valid(float x) { return std::fabs(x) < kVqLargest; }

bool any_above(Vec x, float limit) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(limit), _CMP_GT_OQ);
#elif defined(__AVX2__)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, _mm256_set1_ps(limit), _CMP_GT_OQ));
#else
    bool any = false;
    for (int i = 0; i < kWidth; ++i) any |= x[i] > limit;
    return any;
#endif
}

// f(0) + ... + f(n - 1) in float64, always in the same order: equal codes are equally far.
template <class F>
double sum_of(int n, F&& f) {
    constexpr int kWays = 8;
    double sums[kWays] = {};
    int i = 0;
    for (; i + kWays <= n; i += kWays)
        for (int j = 0; j < kWays; ++j) sums[j] += f(i + j);
    for (; i < n; ++i) sums[0] += f(i);
    double sum = 0;
    for (double x : sums) sum += x;
    return sum;
}

// Squared distance, or 1 - similarity; infinite for a code that isn't valid.
template <class T>
double distance(const T* token, const T* code, int dim, bool cosine) {
    bool all_valid = true;
    for (int i = 0; i < dim; ++i) all_valid &= valid(to_float(code[i]));
    if (!all_valid) return kInfinity;
    auto x = [&](int i) { return double(to_float(token[i])); };
    auto y = [&](int i) { return double(to_float(code[i])); };
    if (!cosine) return sum_of(dim, [&](int i) { return (x(i) - y(i)) * (x(i) - y(i)); });
    const double token_square = sum_of(dim, [&](int i) { return x(i) * x(i); });
    const double square = sum_of(dim, [&](int i) { return y(i) * y(i); });
    constexpr double kLeast = kVqShortest * kVqShortest;
    if (square < kLeast || token_square < kLeast) return 1;
    const double dot = sum_of(dim, [&](int i) { return x(i) * y(i); });
    return 1 - dot / (std::sqrt(square) * std::sqrt(token_square));
}

// A token's best lower bound so far, and the codes that may be better.
struct Token {
    float norm;   // negative: not valid
    float lower;  // the best score is at least this
    int count;    // above kSlots: too many
    int codes[kSlots];
    float upper[kSlots];

    void add(int code, float bound) {
        if (count == kSlots) drop();
        if (count < kSlots) {
            codes[count] = code;
            upper[count] = bound;
        }
        if (count <= kSlots) ++count;
    }
    void drop() {
        count = 0;
        for (int i = 0; i < kSlots; ++i)
            if (upper[i] >= lower) {
                codes[count] = codes[i];
                upper[count++] = upper[i];
            }
    }
};

// What one thread works in; rows are padded to whole vectors.
struct Work {
    Token* tokens;  // [block]
    float* z;       // [block, padded]: less the shift
    float* rows;    // [kPanel, padded]: codes less the shift, or at length 1
    float* panel;   // [padded, kPanel]: the same, turned
    float* scores;  // [kTileRows, kPanel]
    float* shift;   // [padded]
    int block, padded;
    float half_norms[kPanel];  // |e|^2 / 2; infinite: not valid
    float norm;                // the largest of the panel

    static int64_t bytes(int block, int padded) {
        const int64_t floats = int64_t(block) * padded + 2 * kPanel * padded + kTileRows * kPanel;
        return block * int64_t(sizeof(Token)) + (floats + padded) * 4;
    }
    Work(char* memory, int block, int padded) : block(block), padded(padded) {
        z = reinterpret_cast<float*>(memory);
        rows = z + int64_t(block) * padded;
        panel = rows + kPanel * padded;
        scores = panel + kPanel * padded;
        shift = scores + kTileRows * kPanel;
        tokens = reinterpret_cast<Token*>(shift + padded);
    }
};

// The mean of up to 64 valid codes: takes away what all have in common.
template <class T>
void take_shift(const VqLookupParams& p, float* shift) {
    const int count = p.num_codes < 64 ? p.num_codes : 64;
    for (int i = 0; i < p.dim; ++i) {
        float sum = 0;
        int terms = 0;
        for (int j = 0; !p.cosine && j < count; ++j) {
            const int64_t code = int64_t(p.num_codes) * j / count;
            const float x = to_float(static_cast<const T*>(p.codebook)[code * p.dim + i]);
            if (valid(x)) sum += x, ++terms;
        }
        shift[i] = terms ? sum / terms : 0;
    }
}

template <class T>
void take_tokens(const VqLookupParams& p, Work& work, int64_t first, int count) {
    for (int row = 0; row < work.block; ++row) {
        float* to = work.z + int64_t(row) * work.padded;
        Token& token = work.tokens[row];
        token.count = 0;
        token.lower = -kInfinity;
        bool all_valid = row < count;
        for (int i = 0; i < p.dim && row < count; ++i) {
            const float x = to_float(static_cast<const T*>(p.z)[(first + row) * p.dim + i]);
            all_valid &= valid(x);
            to[i] = x - work.shift[i];
        }
        for (int i = 0; i < p.dim && !all_valid; ++i) to[i] = 0;
        const double square = sum_of(p.dim, [&](int i) { return double(to[i]) * to[i]; });
        token.norm = all_valid ? float(std::sqrt(square)) * 1.0001f : -1;
    }
}

// One code into row `row` of the panel.
template <class T>
void take_code(const VqLookupParams& p, Work& work, int code, int row) {
    float* to = work.rows + row * work.padded;
    work.half_norms[row] = kInfinity;
    for (int i = 0; i < work.padded; ++i) to[i] = 0;
    if (code >= p.num_codes) return;
    const T* from = static_cast<const T*>(p.codebook) + int64_t(code) * p.dim;
    bool all_valid = true;
    for (int i = 0; i < p.dim; ++i) {
        const float x = to_float(from[i]);
        all_valid &= valid(x);
        to[i] = x - work.shift[i];
    }
    double square = sum_of(p.dim, [&](int i) { return double(to[i]) * to[i]; });
    float factor = all_valid ? 1 : 0;
    if (p.cosine && all_valid) {
        const bool zero = square < kVqShortest * kVqShortest;
        factor = zero ? 0 : float(1 / std::sqrt(square));
        square = zero ? 0 : 1;
    }
    for (int i = 0; i < p.dim && factor != 1; ++i) to[i] = factor ? to[i] * factor : 0;
    if (!all_valid) return;
    work.half_norms[row] = p.cosine ? 0 : float(square / 2);
    work.norm = std::fmax(work.norm, float(std::sqrt(square)) * 1.0001f);
}

template <class T>
void take_panel(const VqLookupParams& p, Work& work, int first) {
    work.norm = 0;
    for (int row = 0; row < kPanel; ++row) take_code<T>(p, work, first + row, row);
    for (int row = 0; row < kPanel; row += kWidth)
        for (int column = 0; column < work.padded; column += kWidth) {
            Vec square[kWidth];
#pragma GCC unroll 16
            for (int i = 0; i < kWidth; ++i)
                square[i] = load(work.rows + (row + i) * work.padded + column);
            transpose(square);
#pragma GCC unroll 16
            for (int i = 0; i < kWidth; ++i)
                store(work.panel + (column + i) * kPanel + row, square[i]);
        }
}

// Scores of one token with the panel: keeps those that may be the best.
void take_scores(const Work& work, Token& token, const float* products, int dim, int first) {
    // fp32 sums are wrong by dim 2^-24 of |z||e|; shift, half norm and the last step by a few.
    const float bound = float(dim + 12) * 0x1p-24f * token.norm * work.norm +
                        0x1p-21f * work.norm * work.norm + float(dim) * 0x1p-125f;
    Vec scores[kTileCols], best = splat(-kInfinity);
#pragma GCC unroll 8
    for (int j = 0; j < kTileCols; ++j) {
        scores[j] = load(products + j * kWidth) - load(work.half_norms + j * kWidth);
        best = max(best, scores[j]);
    }
    if (!any_above(best, token.lower - bound)) return;
    float values[kPanel], largest = -kInfinity;
#pragma GCC unroll 8
    for (int j = 0; j < kTileCols; ++j) store(values + j * kWidth, scores[j]);
    for (float value : values) largest = std::fmax(largest, value);
    token.lower = std::fmax(token.lower, largest - bound);
    for (int i = 0; i < kPanel; ++i)
        if (values[i] > token.lower - bound) token.add(first + i, values[i] + bound);
}

template <class T>
void finish(const VqLookupParams& p, const Token& token, int64_t row) {
    const T* z = static_cast<const T*>(p.z) + row * p.dim;
    const auto* codebook = static_cast<const T*>(p.codebook);
    const bool every = token.count > kSlots;
    const int count = token.norm < 0 ? 0 : every ? p.num_codes : token.count;
    double best = kInfinity;
    int nearest = -1;
    for (int i = 0; i < count; ++i) {
        if (!every && !(token.upper[i] >= token.lower)) continue;
        const int code = every ? i : token.codes[i];
        const double d = distance(z, codebook + int64_t(code) * p.dim, p.dim, p.cosine);
        if (d < best) best = d, nearest = code;  // codes come in order: the first of equals stays
    }
    const int index = nearest < 0 ? 0 : nearest;
    p.indices[row] = index;
    p.distance[row] = nearest < 0 ? std::numeric_limits<float>::quiet_NaN() : float(best);
    std::memcpy(static_cast<T*>(p.quantized) + row * p.dim, codebook + int64_t(index) * p.dim,
                p.dim * sizeof(T));
}

template <class T>
void look_up(const VqLookupParams& p, Work& work, int64_t first, int count) {
    take_tokens<T>(p, work, first, count);
    for (int code = 0; code < p.num_codes; code += kPanel) {
        take_panel<T>(p, work, code);
        for (int row = 0; row < count; row += kTileRows) {
            multiply_tile<kTileCols, false>(work.z + int64_t(row) * work.padded, work.padded,
                                            work.panel, kPanel, work.scores, kPanel, p.dim,
                                            Assign{});
            for (int i = row; i < row + kTileRows && i < count; ++i)
                take_scores(work, work.tokens[i], work.scores + (i - row) * kPanel, p.dim, code);
        }
    }
    for (int row = 0; row < count; ++row) finish<T>(p, work.tokens[row], first + row);
}

}  // namespace

template <class Isa>
void vq_lookup_cpu(const VqLookupParams& p) {
    if (p.num_tokens == 0) return;
    const int padded = int(round_up(p.dim, kWidth));
    // Tokens that stay in the second-level cache; fewer where threads would be left without.
    const int64_t threads = max_threads(), cached = (1 << 17) / padded;
    const int64_t share = ceil_div(p.num_tokens, threads);
    const int block = int(round_up(share < cached ? share : cached, kTileRows));
    const int64_t bytes = round_up(Work::bytes(block, padded), 64);
    char* memory = static_cast<char*>(std::malloc(threads * bytes));
    if (!memory) throw std::bad_alloc();
    std::atomic<int> taken{0};
    parallel_take(ceil_div(p.num_tokens, block), 1, [&](auto&& take) {
        Work work(memory + taken.fetch_add(1) * bytes, block, padded);
        dispatch_float(p.dtype, [&]<class T>() {
            take_shift<T>(p, work.shift);
            for (int64_t i; (i = take()) >= 0;) {
                const int64_t first = i * block, left = p.num_tokens - first;
                look_up<T>(p, work, first, int(left < block ? left : block));
            }
        });
    });
    std::free(memory);
}

template void vq_lookup_cpu<VLMKERNELS_ISA>(const VqLookupParams& p);

}  // namespace vlmkernels
