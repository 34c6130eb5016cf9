// Backward on sm_90a: the products of qformer_attention_bwd.cuh by wgmma. Operands come by
// cp.async: rows of several heads do not lie in one box of TMA's, and padding must not be read.
#pragma once

#include "common/gemm_hopper.cuh"
#include "qformer_attention/qformer_attention_bwd.cuh"

namespace vlmkernels {

// Copies rows row0.. and columns column0.. of a view, zeros outside; 128 threads.
template <class SharedTile, class View>
__device__ void load_view(uint32_t tile, const View& view, int row0, int column0, int thread) {
    constexpr int kChunks = SharedTile::kColumns / 8, kRowsAtOnce = 128 / kChunks;
    static_assert(128 % kChunks == 0 && SharedTile::kRows % kRowsAtOnce == 0);
    const int chunk = thread % kChunks, column = column0 + chunk * 8;
    const bool inside = column < view.num_columns;
#pragma unroll 4
    for (int row = thread / kChunks; row < SharedTile::kRows; row += kRowsAtOnce) {
        const bool valid = inside && row0 + row < view.num_rows;
        const auto* source = view.data + (valid ? view.row(row0 + row) + column : 0);
        cp_async(tile + SharedTile::offset(row, chunk), source, valid);
    }
}

template <class Product, class T, int m, int n>
using QFormerBwdTile =
    HopperGemmTile<T, m, n, 3, 2, Producer::kThreads, Product::kMajorA, Product::kMajorB>;

template <class Tile, class Product>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    qformer_attention_bwd_hopper_kernel(const __grid_constant__ Product product, int tiles_m,
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
                load_view<typename Tile::A>(stage.a, product.a(image(tile)),
                                            kKA ? m0(tile) : step * 64, kKA ? step * 64 : m0(tile),
                                            stage.thread);
                load_view<typename Tile::B>(stage.b, product.b(image(tile)),
                                            kKB ? n0(tile) : step * 64, kKB ? step * 64 : n0(tile),
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
                    store(c, [&](int row, int column, const float (&values)[8]) {
                        product.store(image(tile), m0(tile) + row, n0(tile) + column, values);
                    });
                }
            });
    }
}

template <class Tile, class Product>
Error launch_bwd_hopper(const Product& product, Stream stream) {
    const int tiles_m = (product.m() + Tile::kM - 1) / Tile::kM;
    const int tiles_n = (product.n() + Tile::kN - 1) / Tile::kN;
    return launch(qformer_attention_bwd_hopper_kernel<Tile, Product>,
                  int64_t(tiles_m) * tiles_n * product.p.batch, Tile::kThreads, Tile::kSharedBytes,
                  stream, product, tiles_m, tiles_n);
}

template <class T>
Error launch(const QFormerAttentionBackwardParams& p, Stream stream) {
    if (!has_hopper()) return launch_sm80<T>(p, stream);
    using P = Probabilities<T>;
    using R = Rows<T>;
    using X = Tokens<T>;
    // 96: 257 tokens leave little of three tiles idle.
    Error error = launch_bwd_hopper<QFormerBwdTile<P, T, 256, 96>>(P{{p, 64}}, stream);
    if (!error) error = launch_bwd_hopper<QFormerBwdTile<R, T, 128, 256>>(R{p}, stream);
    if (error || !p.dx) return error;
    return launch_bwd_hopper<QFormerBwdTile<X, T, 128, 256>>(X{p}, stream);
}

}  // namespace vlmkernels
