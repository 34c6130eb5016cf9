// Launches the kernels of contrastive_hopper.cuh, a panel at a time.
#pragma once

#include <algorithm>

#include "common/launch.cuh"
#include "common/persistent.cuh"
#include "contrastive_loss/contrastive_hopper.cuh"
#include "contrastive_loss/contrastive_loss.h"

namespace vlmkernels {

// TMA wants rows of whole 16-byte chunks.
inline bool takes_hopper(const ContrastivePairs& p) {
    const auto address = reinterpret_cast<uintptr_t>(p.image) | reinterpret_cast<uintptr_t>(p.text);
    return has_hopper() && p.dim % 8 == 0 && address % 16 == 0;
}

inline int num_ctas() { return std::min(num_sms(), kMaxSms); }

// Maps of operand tiles: of rows of images, and of all texts.
template <class SharedTile>
Error image_map(CUtensorMap* map, const ContrastivePairs& p, int first, int rows) {
    const char* data = static_cast<const char*>(p.image) + int64_t(first) * p.dim * 2;
    return operand_map<SharedTile>(map, data, p.dtype, rows, p.dim, p.dim);
}
template <class SharedTile>
Error text_map(CUtensorMap* map, const ContrastivePairs& p) {
    return operand_map<SharedTile>(map, p.text, p.dtype, p.num_texts, p.dim, p.dim);
}

template <class Tile, class... Args>
Error launch_persistent(void (*kernel)(Args...), int64_t m, int64_t n, Stream stream,
                        const std::type_identity_t<Args>&... args) {
    const int64_t tiles = ((m + Tile::kM - 1) / Tile::kM) * ((n + Tile::kN - 1) / Tile::kN);
    return launch(kernel, std::min<int64_t>(tiles, num_ctas()), Tile::kThreads, Tile::kSharedBytes,
                  stream, args...);
}

template <class T, bool kSigmoid>
Error forward_panel_hopper(const ContrastivePairs& p, int first, int rows,
                           const ContrastiveParts<kSigmoid>& parts, Stream stream) {
    using Tile = LogitsTile<T>;
    CUtensorMap image, text;
    Error error = image_map<typename Tile::A>(&image, p, first, rows);
    if (!error) error = text_map<typename Tile::B>(&text, p);
    if (error) return error;
    return launch_persistent<Tile>(contrastive_forward_hopper_kernel<Tile, kSigmoid>, rows,
                                   p.num_texts, stream, image, text, rows, p.num_texts, p.dim,
                                   parts);
}

template <class T, bool kSigmoid>
Error ds_panel_hopper(const ContrastivePairs& p, int first,
                      const ContrastiveGradient<kSigmoid>& gradient, const MatrixView<T>& ds,
                      Stream stream) {
    using Tile = LogitsTile<T>;
    CUtensorMap image, text;
    Error error = image_map<typename Tile::A>(&image, p, first, ds.num_rows);
    if (!error) error = text_map<typename Tile::B>(&text, p);
    if (error) return error;
    return launch_persistent<Tile>(contrastive_ds_hopper_kernel<Tile, kSigmoid>, ds.num_rows,
                                   ds.num_columns, stream, image, text, p.dim, gradient, ds);
}

// dimage = factor ds text, or dtext += factor ds^T image.
template <class T, int n, bool kByText>
Error product_hopper(const ContrastiveBackwardParams& p, int first, const MatrixView<const T>& ds,
                     const MatrixView<float>& out, Stream stream) {
    using Tile = ProductTile<T, n, kByText>;
    CUtensorMap a, b;
    Error error = operand_map<typename Tile::A>(&a, ds.data, p.pairs.dtype, ds.num_rows,
                                                ds.num_columns, ds.stride);
    if (!error)
        error = kByText ? image_map<typename Tile::B>(&b, p.pairs, first, ds.num_rows)
                        : text_map<typename Tile::B>(&b, p.pairs);
    if (error) return error;
    return launch_persistent<Tile>(
        contrastive_products_hopper_kernel<Tile, kByText>, out.num_rows, out.num_columns, stream, a,
        b, kByText ? ds.num_rows : ds.num_columns, out, p.factor, p.pairs.logit_scale, first > 0);
}

// With the width of tile of which the slowest CTA has the least to do.
template <class T, bool kByText>
Error product_hopper(const ContrastiveBackwardParams& p, int first, const MatrixView<const T>& ds,
                     const MatrixView<float>& out, Stream stream) {
    auto work = [&](int64_t n) {
        const int64_t tiles = ((out.num_rows + 127) / 128) * ((out.num_columns + n - 1) / n);
        return (tiles + num_ctas() - 1) / num_ctas() * n;
    };
    if (work(256) <= work(192) && work(256) <= work(128))
        return product_hopper<T, 256, kByText>(p, first, ds, out, stream);
    if (work(192) <= work(128)) return product_hopper<T, 192, kByText>(p, first, ds, out, stream);
    return product_hopper<T, 128, kByText>(p, first, ds, out, stream);
}

template <class T>
Error products_panel_hopper(const ContrastiveBackwardParams& p, int first,
                            const MatrixView<const T>& ds, const MatrixView<float>& dimage,
                            const MatrixView<float>& dtext, Stream stream) {
    Error error = cudaSuccess;
    if (dimage.num_rows) error = product_hopper<T, false>(p, first, ds, dimage, stream);
    if (!error && dtext.num_rows) error = product_hopper<T, true>(p, first, ds, dtext, stream);
    return error;
}

}  // namespace vlmkernels
