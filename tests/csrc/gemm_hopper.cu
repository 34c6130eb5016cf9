// Products of small integers, exact in fp32, through gemm_hopper.cuh; prints what is wrong.
#include <algorithm>
#include <cstdio>
#include <vector>

#include "common/gemm_hopper.cuh"
#include "common/launch.cuh"
#include "common/mma.cuh"

namespace vlmkernels {

struct Shape {
    int m, n, k;
};

// Rows row.. of a row-major matrix by cp.async, as a room would gather them; zeros outside.
template <class SharedTile, class T>
__device__ void gather(uint32_t tile, const T* data, int num_rows, int num_columns, int row0,
                       int column0, int thread) {
    constexpr int kChunks = SharedTile::kColumns / 8;
    for (int i = thread; i < SharedTile::kRows * kChunks; i += 128) {
        const int row = i / kChunks, chunk = i % kChunks;
        const int column = column0 + chunk * 8;
        const bool inside = row0 + row < num_rows && column < num_columns;
        cp_async(tile + SharedTile::offset(row, chunk),
                 inside ? data + int64_t(row0 + row) * num_columns + column : data, inside);
    }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    gemm_kernel(const __grid_constant__ CUtensorMap map_a,
                const __grid_constant__ CUtensorMap map_b, const typename Tile::T* a, float* c,
                Shape shape) {
    if constexpr (kHopperCode) {
        extern __shared__ __align__(1024) unsigned char shared[];
        using A = typename Tile::A;
        using B = typename Tile::B;
        const int tiles_n = (shape.n + Tile::kN - 1) / Tile::kN;
        const int tiles_m = (shape.m + Tile::kM - 1) / Tile::kM;
        gemm_hopper<Tile>(
            shared, tiles_m * tiles_n, [&](int) { return (shape.k + 63) / 64; },
            [&](const HopperStage& stage, int tile, int step) {
                const int m = tile / tiles_n * Tile::kM, n = tile % tiles_n * Tile::kN;
                constexpr bool kKA = Tile::kMajorA == Major::kK, kKB = Tile::kMajorB == Major::kK;
                if constexpr (Tile::kProducer == Producer::kTma) {
                    load_operand<A>(stage.a, &map_a, stage.full, kKA ? m : step * 64,
                                    kKA ? step * 64 : m);
                } else {
                    if (stage.thread == 0) mbarrier_expect(stage.full, B::kBytes);
                    gather<A>(stage.a, a, kKA ? shape.m : shape.k, kKA ? shape.k : shape.m,
                              kKA ? m : step * 64, kKA ? step * 64 : m, stage.thread);
                }
                if (stage.thread == 0)
                    load_operand<B>(stage.b, &map_b, stage.full, kKB ? n : step * 64,
                                    kKB ? step * 64 : n);
            },
            [&](int tile, const auto& sums, const auto& store) {
                const int m = tile / tiles_n * Tile::kM, n = tile % tiles_n * Tile::kN;
                store(sums, [&](int row, int column, const float (&values)[8]) {
                    for (int i = 0; i < 8; ++i)
                        if (m + row < shape.m && n + column + i < shape.n)
                            c[int64_t(m + row) * shape.n + n + column + i] = values[i];
                });
            });
    }
}

// A small integer at (row, column) of matrix `which`.
static int value(int which, int row, int column) {
    return (row * 7 + column * 5 + row * column % 11 + which * 3) % 9 - 4;
}

template <class Tile>
static int check(const char* name, Shape shape, int ctas) {
    using T = typename Tile::T;
    const DType dtype = std::is_same_v<T, __half> ? DType::kFloat16 : DType::kBFloat16;
    constexpr bool kKA = Tile::kMajorA == Major::kK, kKB = Tile::kMajorB == Major::kK;
    auto upload = [&](int which, int rows, int k, bool k_major) {
        std::vector<T> host(size_t(rows) * k);
        for (int row = 0; row < rows; ++row)
            for (int i = 0; i < k; ++i)
                host[k_major ? row * k + i : i * rows + row] = T(float(value(which, row, i)));
        T* device = nullptr;
        cudaMalloc(&device, host.size() * sizeof(T));
        cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyDefault);
        return device;
    };
    T *a = upload(0, shape.m, shape.k, kKA), *b = upload(1, shape.n, shape.k, kKB);
    float* c = nullptr;
    cudaMalloc(&c, size_t(shape.m) * shape.n * 4);
    CUtensorMap map_a, map_b;
    auto rows = [&](int mn, bool k_major) { return k_major ? mn : shape.k; };
    auto columns = [&](int mn, bool k_major) { return k_major ? shape.k : mn; };
    Error error = operand_map<typename Tile::A>(&map_a, a, dtype, rows(shape.m, kKA),
                                                columns(shape.m, kKA), columns(shape.m, kKA));
    if (!error)
        error = operand_map<typename Tile::B>(&map_b, b, dtype, rows(shape.n, kKB),
                                              columns(shape.n, kKB), columns(shape.n, kKB));
    if (!error)
        error = launch(gemm_kernel<Tile>, ctas, Tile::kThreads, Tile::kSharedBytes, nullptr, map_a,
                       map_b, a, c, shape);
    if (!error) error = cudaDeviceSynchronize();
    std::vector<float> got(size_t(shape.m) * shape.n);
    cudaMemcpy(got.data(), c, got.size() * 4, cudaMemcpyDefault);
    int wrong = 0;
    for (int m = 0; m < shape.m; ++m)
        for (int n = 0; n < shape.n; ++n) {
            int want = 0;
            for (int i = 0; i < shape.k; ++i) want += value(0, m, i) * value(1, n, i);
            wrong += got[size_t(m) * shape.n + n] != float(want);
        }
    printf("%s: error %d, %d wrong\n", name, error, wrong);
    cudaFree(a), cudaFree(b), cudaFree(c);
    return error || wrong;
}

static int check_all() {
    using B = __nv_bfloat16;
    using H = __half;
    constexpr auto kTma = Producer::kTma, kThreads = Producer::kThreads;
    constexpr auto kK = Major::kK, kMN = Major::kMN;
    if (!has_hopper()) return printf("no sm_90a\n"), 1;
    return check<HopperGemmTile<B, 128, 128, 3>>("128x128", {200, 136, 328}, 2) |
           check<HopperGemmTile<H, 128, 72, 2, 1>>("one consumer", {128, 72, 136}, 1) |
           check<HopperGemmTile<B, 256, 128, 3>>("128 rows each", {264, 128, 200}, 1) |
           check<HopperGemmTile<H, 128, 256, 2, 2, kTma, kK, kMN>>("b by n", {72, 264, 136}, 2) |
           check<HopperGemmTile<B, 128, 64, 3, 2, kTma, kMN, kK>>("a by m", {136, 64, 200}, 3) |
           check<HopperGemmTile<B, 64, 96, 3, 1, kTma, kMN, kMN>>("both", {64, 96, 72}, 1) |
           check<HopperGemmTile<B, 128, 80, 3, 2, kThreads>>("gathered", {200, 80, 392}, 1) |
           check<HopperGemmTile<H, 128, 112, 4, 1, kThreads, kMN, kMN>>("gathered by m",
                                                                        {136, 112, 456}, 1);
}

}  // namespace vlmkernels

int main() { return vlmkernels::check_all(); }
