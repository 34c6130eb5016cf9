// Chooses tiles and launches: included by instances/*.cu, one element type each.
#pragma once

#include "common/launch.cuh"
#include "patch_embed/patch_embed.cuh"
#include "patch_embed/pixels.cuh"

namespace vlmkernels {

template <class T>
using LargeTile = GemmTile<T, 128, 128, 32, 2, 2, 4>;
template <class T>
using SmallTile = GemmTile<T, 64, 64, 32, 2, 2, 4>;

template <class Tile>
int64_t num_tiles(int64_t m, int64_t n) {
    return ((m + Tile::kM - 1) / Tile::kM) * ((n + Tile::kN - 1) / Tile::kN);
}

// Calls f.template operator()<Tile>() with the tile for an m x n result: small ones where large
// ones would leave much of a GPU idle, and for pixels, whose addresses take registers.
template <class T, bool kPixels, class F>
Error with_tile(int64_t m, int64_t n, F&& f) {
    if constexpr (!kPixels)
        if (num_tiles<LargeTile<T>>(m, n) >= 100) return f.template operator()<LargeTile<T>>();
    return f.template operator()<SmallTile<T>>();
}

template <class Tile, class... Args>
Error launch_tiles(void (*kernel)(Args...), int64_t m, int64_t n, int splits, Stream stream,
                   const std::type_identity_t<Args>&... args) {
    return launch(kernel, Grid(num_tiles<Tile>(m, n), splits), Tile::kThreads, Tile::kSharedBytes,
                  stream, args...);
}

// Calls f(view). kPixels: bytes, blocks, or images of different sizes. Patch rows are an ordinary
// matrix.
template <class T, bool kPixels, class Data, class F>
Error with_view(Data* data, const Patches& p, F&& f) {
    constexpr bool kRead = std::is_const_v<Data>;
    using Element = std::conditional_t<kRead, const T, T>;
    auto* elements = static_cast<Element*>(data);
    if constexpr (!kPixels) {
        if (p.rows) return f(MatrixView(elements, p.stride_image, int(p.num_patches), p.patch_dim));
        return f(PatchView(elements, p));
    } else {
        if constexpr (kRead)
            if (p.dtype == DType::kUInt8)
                return f(PixelView<const uint8_t, T>(static_cast<const uint8_t*>(data), p));
        return f(PixelView<Element, T>(elements, p));
    }
}

template <class T>
PatchEmbedEpilogue<T> make_epilogue(const PatchEmbedParams& p) {
    const int rows = int(p.patches.num_patches), hidden_dim = int(p.hidden_dim);
    const auto* pos_embed = static_cast<const T*>(p.pos_embed);
    const auto* bias = p.float_bias ? nullptr : static_cast<const T*>(p.bias);
    return {.y = {static_cast<T*>(p.y), hidden_dim, rows, hidden_dim},
            .bias = {bias, hidden_dim, bias ? 1 : 0, hidden_dim},
            .float_bias = p.float_bias ? static_cast<const float*>(p.bias) : nullptr,
            .pos_embed = {pos_embed, hidden_dim, pos_embed ? int(p.num_positions) : 0, hidden_dim},
            .positions = FastDivide(unsigned(p.num_positions)),
            .scale = p.scale};
}

// instances/hopper_*.cu: where has_hopper(). They fail with cudaErrorNotSupported, and
// launch nothing, where TMA cannot take an operand.
template <class T>
Error launch_hopper(const PatchEmbedParams& p, Stream stream);
template <class T>
Error launch_hopper(const PatchEmbedDxParams& p, Stream stream);
template <class T>
Error launch_hopper(const PatchEmbedDweightParams& p, Stream stream);

template <class T, bool kPixels>
Error launch(const PatchEmbedParams& p, Stream stream) {
    if (has_hopper())
        if (Error error = launch_hopper<T>(p, stream); error != cudaErrorNotSupported) return error;
    const int rows = int(p.patches.num_patches), hidden_dim = int(p.hidden_dim);
    const PatchEmbedEpilogue<T> epilogue = make_epilogue<T>(p);
    const MatrixView<const T> weight(static_cast<const T*>(p.weight), p.weight_stride, hidden_dim,
                                     p.patches.patch_dim);
    return with_view<T, kPixels>(p.x, p.patches, [&]<class View>(const View& x) {
        return with_tile<T, kPixels>(rows, hidden_dim, [&]<class Tile>() {
            return launch_tiles<Tile>(patch_embed_kernel<Tile, View, T>, rows, hidden_dim, 1,
                                      stream, x, weight, epilogue);
        });
    });
}

template <class T, bool kPixels>
Error launch(const PatchEmbedDxParams& p, Stream stream) {
    if (has_hopper())
        if (Error error = launch_hopper<T>(p, stream); error != cudaErrorNotSupported) return error;
    const int rows = int(p.patches.num_patches), hidden_dim = int(p.hidden_dim);
    const int patch_dim = p.patches.patch_dim;
    const MatrixView<const T> dy(static_cast<const T*>(p.dy), hidden_dim, rows, hidden_dim);
    const MatrixView<const T> weight(static_cast<const T*>(p.weight), p.weight_stride, hidden_dim,
                                     patch_dim);
    return with_view<T, kPixels>(p.dx, p.patches, [&]<class View>(const View& dx) {
        return with_tile<T, kPixels>(rows, patch_dim, [&]<class Tile>() {
            return launch_tiles<Tile>(patch_embed_dx_kernel<Tile, View, T>, rows, patch_dim, 1,
                                      stream, dy, weight, dx, p.scale);
        });
    });
}

template <class T, bool kPixels>
Error launch(const PatchEmbedDweightParams& p, Stream stream) {
    if (has_hopper())
        if (Error error = launch_hopper<T>(p, stream); error != cudaErrorNotSupported) return error;
    const int rows = int(p.patches.num_patches), hidden_dim = int(p.hidden_dim);
    const int patch_dim = p.patches.patch_dim;
    const MatrixView<const T> dy(static_cast<const T*>(p.dy), hidden_dim, rows, hidden_dim);
    auto *dweight = static_cast<T*>(p.dweight), *dbias = static_cast<T*>(p.dbias);
    const PatchEmbedDweightEpilogue<T> epilogue{
        .dweight = {dweight, patch_dim, hidden_dim, patch_dim},
        .dbias = dbias,
        .sums = p.sums,
        .workspace = p.workspace};
    Error error = with_view<T, kPixels>(p.x, p.patches, [&]<class View>(const View& x) {
        return with_tile<T, kPixels>(
            hidden_dim, int64_t(patch_dim) * p.num_splits, [&]<class Tile>() {
                const int steps = (rows + Tile::kK - 1) / Tile::kK;
                const int per_split = (steps + p.num_splits - 1) / p.num_splits;
                return launch_tiles<Tile>(patch_embed_dweight_kernel<Tile, View, T>, hidden_dim,
                                          patch_dim, p.num_splits, stream, dy, x, per_split,
                                          epilogue);
            });
    });
    if (error || !p.workspace || !p.dweight) return error;
    return launch(patch_embed_sum_splits_kernel<T>, grid_for(p.hidden_dim * (patch_dim + 1), 256),
                  256, 0, stream, p.workspace, dweight, dbias, p.num_splits, p.hidden_dim,
                  patch_dim);
}

}  // namespace vlmkernels
