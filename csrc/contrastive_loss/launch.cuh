// Chooses tiles and panels, and launches: included by instances/*.cu, one element type each.
#pragma once

#include <algorithm>

#include "common/launch.cuh"
#include "contrastive_loss/contrastive_bwd.cuh"
#include "contrastive_loss/contrastive_fwd.cuh"
#include "contrastive_loss/contrastive_loss.h"
#include "contrastive_loss/launch_hopper.cuh"

namespace vlmkernels {

template <class T>
using LargeTile = GemmTile<T, 128, 128, 32, 2, 2, 4>;
template <class T>
using SmallTile = GemmTile<T, 64, 64, 32, 2, 2, 4>;

template <class Tile>
int64_t num_tiles(int64_t m, int64_t n) {
    return ((m + Tile::kM - 1) / Tile::kM) * ((n + Tile::kN - 1) / Tile::kN);
}

// Calls f.template operator()<Tile>() with the tile for an m x n result.
template <class T, class F>
Error with_tile(int64_t m, int64_t n, F&& f) {
    if (contrastive_tile(m, n) == 128) return f.template operator()<LargeTile<T>>();
    return f.template operator()<SmallTile<T>>();
}

inline constexpr int kNoPositive = -(1 << 30);

// Rows first.. of a panel.
template <class T>
MatrixView<const T> image_rows(const ContrastivePairs& p, int first, int rows) {
    return {static_cast<const T*>(p.image) + int64_t(first) * p.dim, p.dim, rows, p.dim};
}
template <class T>
MatrixView<const T> texts(const ContrastivePairs& p) {
    return {static_cast<const T*>(p.text), p.dim, p.num_texts, p.dim};
}

template <class... Args>
Error launch_combine(void (*kernel)(Args...), int count, Stream stream,
                     const std::type_identity_t<Args>&... args) {
    kernel<<<(count + kCombineColumns - 1) / kCombineColumns, dim3(kCombineColumns, kCombineSlices),
             0, stream>>>(args...);
    return cudaGetLastError();
}

template <class T, bool kSigmoid>
Error forward_panel(const ContrastivePairs& p, int first, int rows,
                    const ContrastiveParts<kSigmoid>& parts, Stream stream) {
    if (takes_hopper(p)) return forward_panel_hopper<T, kSigmoid>(p, first, rows, parts, stream);
    return with_tile<T>(p.panel_rows, p.num_texts, [&]<class Tile>() {
        return launch(contrastive_forward_kernel<Tile, T, kSigmoid>,
                      Grid(num_tiles<Tile>(rows, p.num_texts)), Tile::kThreads, Tile::kSharedBytes,
                      stream, image_rows<T>(p, first, rows), texts<T>(p), parts);
    });
}

template <class T, bool kSigmoid>
Error forward(const ContrastiveForwardParams& p, Stream stream) {
    const ContrastivePairs& pairs = p.pairs;
    const int tile = contrastive_tile(pairs.panel_rows, pairs.num_texts);
    const bool hopper = takes_hopper(pairs);
    for (int first = 0; first < pairs.num_images; first += pairs.panel_rows) {
        const int rows = std::min(pairs.panel_rows, pairs.num_images - first);
        const int row_parts =
            hopper ? tiles_of(pairs.num_texts, 256) : 2 * tiles_of(pairs.num_texts, tile);
        const int column_parts = hopper ? tiles_of(rows, 64) : 2 * tiles_of(rows, tile);
        auto* workspace = reinterpret_cast<ContrastiveParts<kSigmoid>::Part*>(p.workspace);
        const ContrastiveParts<kSigmoid> parts{
            .rows = workspace,
            .columns = workspace + int64_t(row_parts) * rows,
            .positive = kSigmoid ? nullptr : p.positive + first,
            .logit_scale = pairs.logit_scale,
            .logit_bias = pairs.logit_bias,
            .first_positive = pairs.positives ? first : kNoPositive};
        Error error = forward_panel<T, kSigmoid>(pairs, first, rows, parts, stream);
        if (error) return error;
        if constexpr (kSigmoid) {
            error = launch_combine(contrastive_combine_losses_kernel, rows, stream, parts.rows,
                                   row_parts, rows, p.losses + first);
        } else {
            const bool grow = first > 0, last = first + rows == pairs.num_images;
            error = launch_combine(contrastive_combine_lse_kernel, rows, stream, parts.rows,
                                   row_parts, rows, pairs.logit_scale, false, true,
                                   p.image_lse + first, pairs.num_images);
            if (!error)
                error = launch_combine(contrastive_combine_lse_kernel, pairs.num_texts, stream,
                                       parts.columns, column_parts, pairs.num_texts,
                                       pairs.logit_scale, grow, last, p.text_lse, pairs.num_texts);
        }
        if (error) return error;
    }
    return cudaSuccess;
}

template <class T, bool kSigmoid>
Error ds_panel(const ContrastivePairs& p, int first, const ContrastiveGradient<kSigmoid>& gradient,
               const MatrixView<T>& ds, Stream stream) {
    if (takes_hopper(p)) return ds_panel_hopper<T, kSigmoid>(p, first, gradient, ds, stream);
    return with_tile<T>(p.panel_rows, p.num_texts, [&]<class Tile>() {
        return launch(contrastive_ds_kernel<Tile, T, kSigmoid>,
                      Grid(num_tiles<Tile>(ds.num_rows, p.num_texts)), Tile::kThreads,
                      Tile::kSharedBytes, stream, image_rows<T>(p, first, ds.num_rows), texts<T>(p),
                      gradient, ds);
    });
}

// dimage, dtext: null where they are not wanted.
template <class T>
Error products(const ContrastiveBackwardParams& p, int first, int rows, Stream stream) {
    const ContrastivePairs& pairs = p.pairs;
    const int images = p.dimage ? rows : 0, dim = pairs.dim,
              num_texts = p.dtext ? pairs.num_texts : 0;
    if (!images && !num_texts) return cudaSuccess;
    const MatrixView<const T> ds(static_cast<T*>(p.panel), p.panel_stride, rows,
                                 int(p.panel_stride));
    const MatrixView<float> dimage(images ? p.dimage + int64_t(first) * dim : nullptr, dim, images,
                                   dim);
    const MatrixView<float> dtext(p.dtext, dim, num_texts, dim);
    if (takes_hopper(pairs)) return products_panel_hopper(p, first, ds, dimage, dtext, stream);
    return with_tile<T>(images + num_texts, dim, [&]<class Tile>() {
        return launch(contrastive_products_kernel<Tile, T>,
                      Grid(num_tiles<Tile>(images, dim) + num_tiles<Tile>(num_texts, dim)),
                      Tile::kThreads, Tile::kSharedBytes, stream, ds,
                      image_rows<T>(pairs, first, rows), texts<T>(pairs), dimage, dtext, p.factor,
                      pairs.logit_scale, first > 0);
    });
}

template <class T, bool kSigmoid>
Error backward(const ContrastiveBackwardParams& p, Stream stream) {
    const ContrastivePairs& pairs = p.pairs;
    for (int first = 0; first < pairs.num_images; first += pairs.panel_rows) {
        const int rows = std::min(pairs.panel_rows, pairs.num_images - first);
        const ContrastiveGradient<kSigmoid> gradient{
            .logit_scale = pairs.logit_scale,
            .logit_bias = pairs.logit_bias,
            .image_lse = kSigmoid ? nullptr : p.image_lse + first,
            .text_lse = p.text_lse,
            .num_images = pairs.num_images,
            .image_weight = p.image_weight,
            .text_weight = p.text_weight,
            .first_positive = pairs.positives ? first : kNoPositive,
            .num_rows = rows,
            .num_columns = pairs.num_texts,
            .sums = p.sums,
            .num_sums = p.num_sums};
        const MatrixView<T> ds(static_cast<T*>(p.panel), p.panel_stride, rows, int(p.panel_stride));
        Error error = ds_panel<T, kSigmoid>(pairs, first, gradient, ds, stream);
        if (!error) error = products<T>(p, first, rows, stream);
        if (error) return error;
    }
    return cudaSuccess;
}

template <class T>
Error launch(const ContrastiveForwardParams& p, Stream stream) {
    return p.losses ? forward<T, true>(p, stream) : forward<T, false>(p, stream);
}
template <class T>
Error launch(const ContrastiveBackwardParams& p, Stream stream) {
    return p.image_lse ? backward<T, false>(p, stream) : backward<T, true>(p, stream);
}

}  // namespace vlmkernels
