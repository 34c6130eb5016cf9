// c (m, n) = a (m, k) b (k, n) of 16-bit elements on tensor cores, summed in fp32, for operands
// that are read in place. A CTA computes one kM x kN tile. kStages tiles of k are in flight
// (cp.async); each warp multiplies from swizzled shared memory.
//   view     where element (row, column) of an operand lies, and how many bytes lie together
//   load     copies a tile of a view to shared memory
//   gemm     the loop over k
//   store    hands the result out in runs of 8 columns
#pragma once

#include <initializer_list>
#include <utility>

#include "common/mma.cuh"

namespace vlmkernels {

template <class Element, int m, int n, int k, int warps_m, int warps_n, int stages>
struct GemmTile {
    using T = Element;
    static constexpr int kM = m, kN = n, kK = k, kStages = stages;
    static constexpr int kWarpsM = warps_m, kWarpsN = warps_n;
    static constexpr int kThreads = 32 * warps_m * warps_n;
    static constexpr int kWarpM = m / warps_m, kWarpN = n / warps_n;
    static constexpr int kBytesA = m * k * 2, kBytesB = n * k * 2;
    static constexpr int kSharedBytes = stages * (kBytesA + kBytesB);
    static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0 && k % 32 == 0 && stages >= 3);
    static_assert(kSharedBytes >= kThreads / 32 * 16 * kWarpN * 4, "room for store()");
    // kWarpM x kWarpN of c, as 16 x 8 fragments.
    using Accumulators = float[kWarpM / 16][kWarpN / 8][4];
};

// A row-major matrix. Its elements lie together in aligned runs of `run_bytes` (2, 4, 8 or 16),
// which is how it is copied.
template <class Element>
struct MatrixView {
    using T = Element;
    static constexpr bool kAffine = true;  // rows are as cheap to find as to remember
    T* data;
    int64_t stride;
    int num_rows, num_columns;
    int run_bytes;

    MatrixView(T* data, int64_t stride, int num_rows, int num_columns)
        : data(data),
          stride(stride),
          num_rows(num_rows),
          num_columns(num_columns),
          run_bytes(common_alignment(data, {stride, num_columns})) {}
    __device__ int64_t row(int row) const { return row * stride; }
    __device__ int column(int column) const { return column; }

    // The largest power of two up to 16 that divides an address and these counts of elements.
    static int common_alignment(const void* data, std::initializer_list<int64_t> counts) {
        uint64_t bits = reinterpret_cast<uintptr_t>(data) | 16;
        for (int64_t count : counts) bits |= uint64_t(count) * sizeof(T);
        return int(bits & -bits);
    }
};

// Copies one row's chunk of 8 elements in runs of kRunBytes, zeros for those that aren't valid.
// offsets: of the runs within the row.
template <int kRunBytes, class T>
__device__ void load_chunk(uint32_t shared, const T* row, const int (&offsets)[16 / kRunBytes],
                           const bool (&valid)[16 / kRunBytes]) {
    constexpr int kRuns = 16 / kRunBytes;
    if constexpr (kRunBytes == 2) {  // too narrow for cp.async
        uint32_t pairs[4] = {};
        const auto* source = reinterpret_cast<const uint16_t*>(row);
#pragma unroll
        for (int i = 0; i < kRuns; ++i)
            if (valid[i]) pairs[i / 2] |= uint32_t(source[offsets[i]]) << i % 2 * 16;
        store_shared(shared, pairs);
    } else {
#pragma unroll
        for (int i = 0; i < kRuns; ++i)
            cp_async<kRunBytes>(shared + i * kRunBytes, row + offsets[i], valid[i]);
    }
}

// Copies tiles of kRows x kColumns of a view to shared memory; holds what stays from tile to tile.
// Tiles follow each other along the columns (kAlongRows false: operands kA and kB) or along the
// rows (kATransposed, kBTransposed). What lies outside of the view is not read: in the direction of
// k it becomes zero; across, any values that only reach results outside.
template <int kRows, int kColumns, int kThreads, bool kAlongRows, class View>
class TileLoader {
  public:
    // start: of the tiles across k. first_step: of this CTA's part of k.
    __device__ TileLoader(const View& view, int start, int first_step, int thread)
        : view_(view), first_step_(first_step), row_(thread / kChunks) {
        const int chunk = thread % kChunks;
        shared_offset_ = Layout::offset(row_, chunk);
        column_ = chunk * 8 + (kAlongRows ? start : 0);
        if constexpr (!kAlongRows) {
            row_ += start;
            if constexpr (kCached)
#pragma unroll
                for (int i = 0; i < kCount; ++i) rows_[i] = view.row(row_ + i * kStep);
        }
    }
    __device__ void operator()(uint32_t tile, int step) {
        step += first_step_;
        switch (view_.run_bytes) {
            case 16: return load_runs<16>(tile, step);
            case 8: return load_runs<8>(tile, step);
            case 4: return load_runs<4>(tile, step);
            default: return load_runs<2>(tile, step);
        }
    }

  private:
    using Layout = TileLayout<kColumns>;
    static constexpr int kChunks = kColumns / 8, kStep = kThreads / kChunks, kCount = kRows / kStep;
    // Then neighbouring rows of a thread are swizzled alike.
    static_assert(kThreads % kChunks == 0 && kRows % kStep == 0 && kStep % 8 == 0);

    static constexpr bool kCached = !kAlongRows && !View::kAffine;

    template <int kRunBytes>
    __device__ void load_runs(uint32_t tile, int step) const {
        constexpr int kRuns = 16 / kRunBytes;
        const int column0 = column_ + (kAlongRows ? 0 : step * kColumns);
        decltype(view_.column(0)) columns[kRuns];
        bool inside[kRuns];
#pragma unroll
        for (int i = 0; i < kRuns; ++i) {
            const int column = column0 + i * (8 / kRuns);
            inside[i] = column < view_.num_columns;
            columns[i] = view_.column(column);
        }
        const int row0 = row_ + (kAlongRows ? step * kRows : 0);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const int row = row0 + i * kStep;
            const auto row_offset = kCached ? rows_[kCached ? i : 0] : view_.row(row);
            bool valid[kRuns];
#pragma unroll
            for (int j = 0; j < kRuns; ++j) valid[j] = row < view_.num_rows && inside[j];
            const uint32_t chunk = tile + shared_offset_ + i * kStep * Layout::kRowBytes;
            if constexpr (std::is_integral_v<decltype(view_.row(0))>)
                load_chunk<kRunBytes>(chunk, view_.data + row_offset, columns, valid);
            else  // a view whose rows are more than an offset brings its own
                load_chunk<kRunBytes>(view_, chunk, row_offset, columns, valid);
        }
    }

    const View& view_;
    int first_step_, row_, column_;
    uint32_t shared_offset_;
    decltype(std::declval<View>().row(0)) rows_[kCached ? kCount : 1];
};

// The loader of an operand of gemm(): its tiles begin at `start` across k and step first_step of k.
template <class Tile, Operand kOperand, class View>
__device__ auto operand_loader(const View& view, int start, int thread, int first_step = 0) {
    constexpr bool kTrans = kOperand == Operand::kATransposed || kOperand == Operand::kBTransposed;
    constexpr bool kIsA = kOperand == Operand::kA || kOperand == Operand::kATransposed;
    constexpr int kAcross = kIsA ? Tile::kM : Tile::kN;
    return TileLoader<kTrans ? Tile::kK : kAcross, kTrans ? kAcross : Tile::kK, Tile::kThreads,
                      kTrans, View>(view, start, first_step, thread);
}

// The fragments that a warp multiplies. They arrive just ahead of their products: b one fragment
// ahead, a one slice of 16 of k.
template <class Tile, Operand kOperandA, Operand kOperandB>
struct GemmFragments {
    static constexpr bool kTransA = kOperandA == Operand::kATransposed,
                          kTransB = kOperandB == Operand::kBTransposed;
    static constexpr int kI = Tile::kWarpM / 16, kJ = Tile::kWarpN / 16;
    static_assert(kJ % 2 == 0 && kI % kJ == 0);
    FragmentLoader<kTransA ? Tile::kM : Tile::kK, kOperandA> loader_a;
    FragmentLoader<kTransB ? Tile::kN : Tile::kK, kOperandB> loader_b;
    int m0, n0;
    uint32_t a[2][kI][4], b[2][4];

    __device__ explicit GemmFragments(int thread)
        : loader_a(thread % 32),
          loader_b(thread % 32),
          m0(thread / 32 / Tile::kWarpsN * Tile::kWarpM),
          n0(thread / 32 % Tile::kWarpsN * Tile::kWarpN) {}
    __device__ void load_a(int slot, int i, uint32_t stage, int k) {
        const int m = m0 + i * 16;
        loader_a(a[slot][i], stage, kTransA ? k : m, (kTransA ? m : k) / 8);
    }
    __device__ void load_b(int slot, int j, uint32_t stage, int k) {
        const int n = n0 + j * 16;
        loader_b(b[slot], stage + Tile::kBytesA, kTransB ? k : n, (kTransB ? n : k) / 8);
    }
};

// c += the product of num_steps tiles of k. load_a(shared, step) and load_b copy tile `step` of an
// operand, laid out as the operand says: kA m x k, kATransposed k x m, kB n x k, kBTransposed k x
// n. on_a(i, fragment) sees each fragment of a that this warp multiplies, rows 16 * i.. of its
// part.
template <class Tile, Operand kOperandA, Operand kOperandB, class LoadA, class LoadB, class OnA>
__device__ void gemm(typename Tile::Accumulators& c, uint32_t shared, int num_steps, int thread,
                     LoadA&& load_a, LoadB&& load_b, OnA&& on_a) {
    using T = typename Tile::T;
    using Fragments = GemmFragments<Tile, kOperandA, kOperandB>;
    constexpr int kStages = Tile::kStages, kI = Fragments::kI, kJ = Fragments::kJ;
    auto stage = [&](int step) {
        return shared + step % kStages * (Tile::kBytesA + Tile::kBytesB);
    };
    // Apart, so that their copies do not queue up before the same products.
    auto load_stage_a = [&](int step) {
        if (step < num_steps) load_a(stage(step), step);
    };
    auto load_stage_b = [&](int step) {
        if (step < num_steps) load_b(stage(step) + Tile::kBytesA, step);
        cp_async_commit();
    };
    if (num_steps <= 0) return;
    for (int step = 0; step < kStages - 1; ++step) load_stage_a(step), load_stage_b(step);
    cp_async_wait<kStages - 2>();
    __syncthreads();
    Fragments f(thread);
#pragma unroll
    for (int i = 0; i < kI; ++i) f.load_a(0, i, stage(0), 0);
    f.load_b(0, 0, stage(0), 0);
    for (int step = 0; step < num_steps; ++step) {
#pragma unroll
        for (int k = 0; k < Tile::kK; k += 16) {
            const bool last = k == Tile::kK - 16;
            const int slot = k / 16 % 2, next_k = last ? 0 : k + 16;
            const uint32_t next_stage = stage(last ? min(step + 1, num_steps - 1) : step);
            if (last) {  // the next tile is there, and no warp reads the one before this
                cp_async_wait<kStages - 3>();
                __syncthreads();
                load_stage_a(step + kStages - 1);
            } else if (k == 0 && step > 0) {
                load_stage_b(step + kStages - 2);
            }
#pragma unroll
            for (int j = 0; j < kJ; ++j) {
                if (j + 1 < kJ)
                    f.load_b((j + 1) % 2, j + 1, stage(step), k);
                else
                    f.load_b(0, 0, next_stage, next_k);
#pragma unroll
                for (int i = j * (kI / kJ); i < (j + 1) * (kI / kJ); ++i)
                    f.load_a(1 - slot, i, next_stage, next_k);
#pragma unroll
                for (int i = 0; i < kI; ++i) {
                    if (j == 0) on_a(i, f.a[slot][i]);
                    mma(c[i][2 * j], f.a[slot][i], f.b[j % 2][0], f.b[j % 2][1], T());
                    mma(c[i][2 * j + 1], f.a[slot][i], f.b[j % 2][2], f.b[j % 2][3], T());
                }
            }
        }
    }
    __syncthreads();  // the shared memory is free again
}
template <class Tile, Operand kOperandA, Operand kOperandB, class LoadA, class LoadB>
__device__ void gemm(typename Tile::Accumulators& c, uint32_t shared, int num_steps, int thread,
                     LoadA&& load_a, LoadB&& load_b) {
    gemm<Tile, kOperandA, kOperandB>(c, shared, num_steps, thread, load_a, load_b,
                                     [](int, const uint32_t (&)[4]) {});
}

// Calls store(row, column, values) with rows and columns within the CTA's tile and 8 values each,
// neighbouring lanes with neighbouring columns. Goes through shared memory, 16 rows at a time.
template <class Tile, class Store>
__device__ void store(const typename Tile::Accumulators& c, float* shared, int thread,
                      Store&& store) {
    constexpr int kChunks = Tile::kWarpN / 8;
    const int lane = thread % 32, warp = thread / 32;
    const int m0 = warp / Tile::kWarpsN * Tile::kWarpM, n0 = warp % Tile::kWarpsN * Tile::kWarpN;
    float* part = shared + warp * 16 * Tile::kWarpN;
    // Half a chunk, 16 bytes; permuted against bank conflicts.
    auto at = [&](int row, int chunk, int half) {
        chunk ^= row % kChunks;
        return part + row * Tile::kWarpN + chunk * 8 + (half ^ chunk / 4 % 2) * 4;
    };
#pragma unroll
    for (int i = 0; i < Tile::kWarpM / 16; ++i) {
#pragma unroll
        for (int j = 0; j < kChunks; ++j)
#pragma unroll
            for (int below = 0; below < 2; ++below)
                *reinterpret_cast<float2*>(at(lane / 4 + below * 8, j, lane % 4 / 2) +
                                           lane % 2 * 2) =
                    make_float2(c[i][j][below * 2], c[i][j][below * 2 + 1]);
        __syncwarp();
        for (int index = lane; index < 16 * kChunks; index += 32) {
            const int row = index / kChunks, chunk = index % kChunks;
            float values[8];
#pragma unroll
            for (int half = 0; half < 2; ++half)
                *reinterpret_cast<float4*>(values + half * 4) =
                    *reinterpret_cast<const float4*>(at(row, chunk, half));
            store(m0 + i * 16 + row, n0 + chunk * 8, values);
        }
        __syncwarp();
    }
}

}  // namespace vlmkernels
