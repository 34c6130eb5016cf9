// Backward on sm_90a: the products of qformer_attention_bwd.cuh by wgmma. Operands come by
// cp.async: rows of several heads do not lie in one box of TMA's, and padding must not be read.
#pragma once

#include "common/gemm_hopper.cuh"
#include "common/persistent.cuh"
#include "qformer_attention/qformer_attention_bwd.cuh"

namespace vlmkernels {

// Copies rows row0.. and columns column0.. of a view, zeros outside; 128 threads. A thread stays in
// one chunk of the panels, and finds a row once for all of them.
template <class SharedTile, class View>
__device__ void load_view(uint32_t tile, const View& view, int row0, int column0, int thread) {
    static_assert(SharedTile::kPanelColumns == 64 && SharedTile::kRows % 16 == 0);
    const int first = thread / 8, column = column0 + thread % 8 * 8;
    tile += SharedTile::offset(first, thread % 8);
#pragma unroll
    for (int i = 0; i < SharedTile::kRows / 16; ++i) {
        const int row = row0 + first + i * 16;
        const auto* source = view.data + view.row(row) + column;
#pragma unroll
        for (int panel = 0; panel < SharedTile::kPanels; ++panel)
            cp_async(tile + panel * SharedTile::kPanelBytes + i * 16 * SharedTile::kSpan,
                     source + panel * 64,
                     row < view.num_rows && column + panel * 64 < view.num_columns);
    }
}

template <class Product, class T, int m, int n>
using QFormerBwdTile =
    HopperGemmTile<T, m, n, 3, 2, Producer::kThreads, Product::kMajorA, Product::kMajorB>;

// Stores the rows row and row + 8 of a warp's c, columns from n0 on, straight from the
// accumulators: neighbouring lanes exchange halves, so that a row gets 32 bytes at once.
template <class Product, int kBlocks>
__device__ void store_fragments(const Product& product, int image, int row, int n0, int lane,
                                const float (&c)[kBlocks][4]) {
    using T = typename Product::Element;
    const bool odd = lane % 2;
    const int first = n0 + lane % 4 * 2 + odd * 6, width = product.p.width - n0 - odd * 8;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        T* to = product.row_of(image, row + half * 8);
#pragma unroll
        for (int block = 0; block < kBlocks; block += 2) {
            const uint32_t low = pack<T>(c[block][half * 2], c[block][half * 2 + 1]);
            const uint32_t high = pack<T>(c[block + 1][half * 2], c[block + 1][half * 2 + 1]);
            const uint32_t other = __shfl_xor_sync(~0u, odd ? low : high, 1);
            if (to && block * 8 < width)
                *reinterpret_cast<uint2*>(to + first + block * 8) =
                    odd ? make_uint2(other, high) : make_uint2(low, other);
        }
    }
}

template <class Tile, class Product>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    qformer_attention_bwd_hopper_kernel(const __grid_constant__ Product product,
                                        const __grid_constant__ CUtensorMap map, int tiles_m,
                                        int tiles_n) {
    if constexpr (kHopperCode) {
        extern __shared__ __align__(1024) unsigned char shared[];
        constexpr bool kKA = Tile::kMajorA == Major::kK, kKB = Tile::kMajorB == Major::kK;
        auto image = [&](int tile) { return tile / (tiles_m * tiles_n); };
        auto m0 = [&](int tile) { return tile / tiles_n % tiles_m * Tile::kM; };
        auto n0 = [&](int tile) { return tile % tiles_n * Tile::kN; };
        gemm_hopper<Tile>(
            shared, tiles_m * tiles_n * product.p.batch,
            [&](int tile) { return (product.depth(image(tile), m0(tile), n0(tile)) + 63) / 64; },
            [&](const HopperStage& stage, int tile, int step) {
                using Whole =
                    std::conditional_t<Product::kTmaA, typename Tile::A, typename Tile::B>;
                const int k = step * 64, row_a = kKA ? m0(tile) : k, column_a = kKA ? k : m0(tile);
                const int row_b = kKB ? n0(tile) : k, column_b = kKB ? k : n0(tile);
                if (stage.thread == 0) {
                    mbarrier_expect(stage.full, Whole::kBytes);
                    load_operand<Whole>(Product::kTmaA ? stage.a : stage.b, &map, stage.full,
                                        Product::kTmaA ? row_a : row_b,
                                        Product::kTmaA ? column_a : column_b, image(tile));
                }
                if constexpr (Product::kTmaA)
                    load_view<typename Tile::B>(stage.b, product.b(image(tile)), row_b, column_b,
                                                stage.thread);
                else
                    load_view<typename Tile::A>(stage.a, product.a(image(tile)), row_a, column_a,
                                                stage.thread);
            },
            [&](int tile, const typename Tile::Accumulators& c, const RowStore<Tile>& store) {
                if constexpr (Product::kPairs) {
                    const int row = (m0(tile) + store.row0 / Tile::kRows * Tile::kRows) / 2 +
                                    store.row0 % Tile::kRows + store.lane / 4;
#pragma unroll
                    for (int half = 0; half < 2; ++half)
                        product.store_pair(image(tile), row + half * 8,
                                           n0(tile) + store.lane % 4 * 2, c[0], c[1], half);
                } else {
                    store_fragments(product, image(tile), m0(tile) + store.row0 + store.lane / 4,
                                    n0(tile), store.lane, c[0]);
                }
            });
    }
}

template <class Tile, class Product>
Error launch_bwd_hopper(const Product& product, Stream stream) {
    using Whole = std::conditional_t<Product::kTmaA, typename Tile::A, typename Tile::B>;
    const QFormerAttentionBackwardParams& p = product.p;
    const auto& view = [&]() -> const auto& {
        if constexpr (Product::kTmaA)
            return product.weights;
        else
            return product.x;
    }();
    const int64_t image_stride =
        Product::kTmaA ? int64_t(view.num_rows) * view.num_columns : p.x_batch_stride;
    CUtensorMap map;
    if (Error error = encode_tensor_map(&map, view.data, p.dtype,
                                        {{view.num_columns, 1, Whole::kPanelColumns},
                                         {view.num_rows, view.stride, Whole::kRows},
                                         {p.batch, image_stride, 1}},
                                        Whole::kSwizzle))
        return error;
    const int tiles_m = (product.m() + Tile::kM - 1) / Tile::kM;
    const int tiles_n = (product.n() + Tile::kN - 1) / Tile::kN;
    return launch_persistent<Tile>(qformer_attention_bwd_hopper_kernel<Tile, Product>,
                                   int64_t(tiles_m) * tiles_n * p.batch, stream, product, map,
                                   tiles_m, tiles_n);
}

template <class T>
Error launch(const QFormerAttentionBackwardParams& p, Stream stream) {
    // TMA knows no empty tensors, and no tokens or images that are one in memory (expand).
    const bool for_tma = p.num_tokens && p.width && p.x_batch_stride && p.x_token_stride;
    if (!has_hopper() || !for_tma) return launch_sm80<T>(p, stream);
    using P = Probabilities<T>;
    using R = Rows<T>;
    using X = Tokens<T>;
    // 96: 257 tokens leave little of three tiles idle.
    Error error = launch_bwd_hopper<QFormerBwdTile<P, T, 256, 96>>(P{{p, 6}}, stream);
    if (!error) error = launch_bwd_hopper<QFormerBwdTile<R, T, 128, 256>>(R{p}, stream);
    if (error || !p.dx) return error;
    return launch_bwd_hopper<QFormerBwdTile<X, T, 128, 256>>(X{p}, stream);
}

}  // namespace vlmkernels
