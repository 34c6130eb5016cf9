// Forward in bfloat16 on AMX tiles: the same walk over panels and blocks of keys, with both
// products in tiles of 16 x 16. A tile wants its second factor as pairs of rows side by side:
//   scores[key, lane] = k[key, d] q[d, lane]        k as it is, q as pairs of d
//   out[d, lane]     += v^T[d, key] p[key, lane]    v transposed, p as pairs of keys
#pragma once

#include "attention/attention_panel_cpu.h"

namespace vlmkernels {
namespace {

#if defined(__AMX_BF16__) && defined(__AVX512F__)

constexpr int64_t kTile = 16;
constexpr int64_t kTileDepth = 32;  // bfloat16 in a row of a tile
constexpr int64_t kAmxKeys = 128;   // in a block
constexpr int64_t kAmxPanels = 4;

// All eight tiles 16 rows of 64 bytes, for this thread, for a while.
class TileScope {
  public:
    TileScope() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = 16;
        _tile_loadconfig(&config);
    }
    ~TileScope() { _tile_release(); }
};

// C[16 kRows, 32] = [C +] A[16 kRows, depth] B[depth / 2, 32 pairs], kRows = 1 or 2.
template <int kRows>
void multiply_tiles(const uint16_t* a, int64_t lda, const float* b, int64_t ldb, float* c,
                    int64_t ldc, int64_t depth, bool add) {
    float* low = c + kTile * ldc;
    asm volatile("" ::: "memory");  // gcc does not know that _tile_loadd reads memory
    if (add) {
        _tile_loadd(0, c, ldc * 4);
        _tile_loadd(1, c + kTile, ldc * 4);
    } else {
        _tile_zero(0);
        _tile_zero(1);
    }
    if (kRows == 2 && add) {
        _tile_loadd(2, low, ldc * 4);
        _tile_loadd(3, low + kTile, ldc * 4);
    } else {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < depth; k += kTileDepth) {
        const float* pairs = b + k / 2 * ldb;
        _tile_loadd(4, a + k, lda * 2);
        _tile_loadd(6, pairs, ldb * 4);
        _tile_loadd(7, pairs + kTile, ldb * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (kRows == 1) continue;
        _tile_loadd(5, a + kTile * lda + k, lda * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, ldc * 4);
    _tile_stored(1, c + kTile, ldc * 4);
    if (kRows == 1) return;
    _tile_stored(2, low, ldc * 4);
    _tile_stored(3, low + kTile, ldc * 4);
}

// C[rows, lanes]: rows a multiple of 16, lanes of 32.
inline void multiply_amx(const uint16_t* a, int64_t lda, const float* b, int64_t lanes, float* c,
                         int64_t rows, int64_t depth, bool add) {
    for (int64_t i = 0; i < rows; i += 2 * kTile)
        for (int64_t lane = 0; lane < lanes; lane += 2 * kTile) {
            auto* multiply = rows - i > kTile ? multiply_tiles<2> : multiply_tiles<1>;
            multiply(a + i * lda, lda, b + lane, lanes, c + i * lanes + lane, lanes, depth, add);
        }
}

// 16 pairs of bfloat16 as one vector; those from n on are zero.
inline Vec load_pairs(const BFloat16* p, int64_t n) {
    uint16_t lanes[2 * kWidth] = {};
    std::memcpy(lanes, p, std::min<int64_t>(n, 2 * kWidth) * 2);
    Vec x;
    std::memcpy(&x, lanes, sizeof x);
    return x;
}

// Probabilities as pairs (of keys) of bfloat16, rounded to nearest.
VLMKERNELS_INLINE Vec as_pairs(Vec first, Vec second) {
    return (Vec)(((Bits)first + 0x8000) >> 16 | (((Bits)second + 0x8000) & 0xffff0000u));
}

class ForwardAmx {
  public:
    static int64_t memory_size(const AttentionParams& p) {
        const int64_t depth = round_up(p.head_dim, kTileDepth);
        const int64_t out_rows = round_up(p.head_dim, kTile);
        return kAmxPanels * kMostLanes * (depth / 2 + out_rows) +
               kAmxKeys * (depth / 2 + out_rows / 2 + kMostLanes + kMostLanes / 2);
    }

    ForwardAmx(const AttentionParams& p, float* memory)
        : p_(p), depth_(round_up(p.head_dim, kTileDepth)), out_rows_(round_up(p.head_dim, kTile)) {
        float* at = memory;
        auto take = [&](int64_t size) { return std::exchange(at, at + size); };
        for (Panel& panel : panels_) {
            panel.q = take(kMostLanes * depth_ / 2);
            panel.out = take(kMostLanes * out_rows_);
        }
        k_ = reinterpret_cast<uint16_t*>(take(kAmxKeys * depth_ / 2));
        v_columns_ = reinterpret_cast<uint16_t*>(take(kAmxKeys * out_rows_ / 2));
        scores_ = take(kAmxKeys * kMostLanes);
        probabilities_ = take(kAmxKeys / 2 * kMostLanes);
    }

    void run(const Item& item) {
        const Problem problem(p_, item.sequence, item.head_k);
        int64_t count = 0;
        for (int64_t begin = item.begin; begin < item.end; begin += kMostLanes)
            start(panels_[count++], problem, begin, std::min(begin + kMostLanes, item.end));
        const Span span = keys_of(panels_, count);
        for (int64_t key = span.begin / kAmxKeys * kAmxKeys; key < span.end; key += kAmxKeys) {
            const int64_t keys = std::min(kAmxKeys, span.end - key);
            bool loaded = false;
            for (int64_t i = 0; i < count; ++i) {
                if (!panels_[i].mask.sees(key, keys)) continue;
                if (!loaded) load_keys(problem, key, keys);
                loaded = true;
                panels_[i].cols == 4 ? attend<4>(panels_[i], key, keys)
                                     : attend<2>(panels_[i], key, keys);
            }
        }
        for (int64_t i = 0; i < count; ++i) finish_panel<BFloat16>(panels_[i], problem);
    }

  private:
    void start(Panel& panel, const Problem& problem, int64_t begin, int64_t end) {
        const BFloat16* rows[kMostLanes];
        start_panel(panel, problem, begin, end, rows);
        panel.cols = panel.rows > 2 * kTile ? 4 : 2;
        for (int64_t lane = 0; lane < panel.cols * kWidth; lane += kWidth)
            for (int64_t d = 0; d < depth_; d += kTileDepth) {
                Vec m[kWidth];
                for (int i = 0; i < kWidth; ++i)
                    m[i] = lane + i < panel.rows ? load_pairs(rows[lane + i] + d, p_.head_dim - d)
                                                 : Vec{};
                transpose(m);
                for (int i = 0; i < kWidth; ++i)
                    store(panel.q + (d / 2 + i) * panel.cols * kWidth + lane, m[i]);
            }
    }

    // k as rows and v as columns; zero up to multiples of 32 keys and of the tiles.
    void load_keys(const Problem& problem, int64_t first, int64_t keys) {
        const BFloat16* v[kAmxKeys];
        for (int64_t key = 0; key < keys; ++key)
            v[key] = problem.key<const BFloat16>(p_.v, first + key);
        std::memset(k_, 0, round_up(keys, kTileDepth) * depth_ * 2);
        for (int64_t key = 0; key < keys; ++key)
            std::memcpy(k_ + key * depth_, problem.key<const BFloat16>(p_.k, first + key),
                        p_.head_dim * 2);
        for (int64_t key = 0; key < keys; key += kTileDepth)
            for (int64_t d = 0; d < p_.head_dim; d += kTile) {
                Vec m[kWidth];
                for (int i = 0; i < kWidth; ++i) {
                    Bits pair[2] = {};
                    for (int half = 0; half < 2; ++half) {
                        const int64_t row = key + 2 * i + half;
                        if (row < keys) pair[half] = (Bits)load_first(v[row] + d, p_.head_dim - d);
                    }
                    m[i] = (Vec)(pair[0] >> 16 | pair[1]);
                }
                transpose(m);
                for (int i = 0; i < kWidth; ++i)
                    std::memcpy(v_columns_ + (d + i) * kAmxKeys + key, &m[i], sizeof m[i]);
            }
    }

    template <int kCols>
    void attend(Panel& panel, int64_t first, int64_t keys) {
        constexpr int64_t lanes = kCols * kWidth;
        const int64_t padded = round_up(keys, kTileDepth);
        multiply_amx(k_, depth_, panel.q, lanes, scores_, padded, depth_, false);
        panel.mask.prepare<kCols>(scores_, nullptr, first, keys);
        fill(scores_ + keys * lanes, scores_ + padded * lanes, -kInfinity);
        softmax<kCols>(panel, padded);
        if (panel.started && panel.rose)
            for (int64_t d = 0; d < p_.head_dim; ++d)
                for (int c = 0; c < kCols; ++c) {
                    float* at = panel.out + (d * kCols + c) * kWidth;
                    store(at, load(at) * load(panel.rescale + c * kWidth));
                }
        multiply_amx(v_columns_, kAmxKeys, probabilities_, lanes, panel.out, out_rows_, padded,
                     panel.started);
        panel.started = true;
    }

    template <int kCols>
    void softmax(Panel& panel, int64_t keys) {
        const float scale = Mask::unit(p_) * kLog2e;
        Vec base[kCols], sums[kCols] = {};
        raise_max(panel, scores_, keys, Mask::unit(p_), base);
        for (int64_t key = 0; key < keys; key += 2)
            for (int c = 0; c < kCols; ++c) {
                const float* at = scores_ + (key * kCols + c) * kWidth;
                const Vec first = exp2(load(at) * scale - base[c]);
                const Vec second = exp2(load(at + kCols * kWidth) * scale - base[c]);
                store(probabilities_ + (key / 2 * kCols + c) * kWidth, as_pairs(first, second));
                sums[c] += first + second;
            }
        add_sums(panel, sums);
    }

    const AttentionParams& p_;
    const int64_t depth_, out_rows_;
    Panel panels_[kAmxPanels];
    uint16_t *k_, *v_columns_;        // [keys, depth], [head_dim, kAmxKeys]
    float *scores_, *probabilities_;  // [keys, lanes], [keys / 2, lanes] pairs
};

// False where another kernel must do it.
inline bool attention_fwd_amx(const AttentionParams& p) {
    if (p.dtype != DType::kBFloat16 || isa_level() < 3) return false;
    const std::vector<Item> items = make_items(p, kAmxPanels * kMostLanes);
    parallel_take(int64_t(items.size()), grain_of(items, p.head_dim), ForwardAmx::memory_size(p),
                  [&](auto&& take, float* memory) {
                      TileScope tiles;
                      ForwardAmx forward(p, memory);
                      for (int64_t i; (i = take()) >= 0;) forward.run(items[i]);
                  });
    return true;
}

#else

inline bool attention_fwd_amx(const AttentionParams&) { return false; }

#endif

}  // namespace
}  // namespace vlmkernels
