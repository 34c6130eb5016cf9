// Tensor maps and launches of the Hopper kernels: included by instances/hopper_*.cu.
#pragma once

#include "common/persistent.cuh"
#include "patch_embed/dweight_hopper.cuh"
#include "patch_embed/hopper.cuh"
#include "patch_embed/launch.cuh"
#include "patch_embed/resident.cuh"

namespace vlmkernels {

// From bytes: 38 panels are 1216 columns of patches.
template <class T, int kN, int kStages>
Error launch_resident(const PatchEmbedParams& p, Stream stream) {
    using Tile = ResidentTile<T, kN, 38, kStages>;
    const Patches& s = p.patches;
    CUtensorMap weight;
    if (Error error = operand_map<typename Tile::B>(&weight, p.weight, p.dtype, p.hidden_dim,
                                                    s.patch_dim, p.weight_stride))
        return error;
    const PixelView<const uint8_t, T> x(static_cast<const uint8_t*>(p.x), s);
    const int64_t count = num_tiles<Tile>(s.num_patches, p.hidden_dim);
    const int64_t each = (count + num_sms() - 1) / num_sms();
    const int tiles_n = int(num_tiles<Tile>(1, p.hidden_dim));
    const bool resident = s.patch_dim <= Tile::kPanels * 32;
    const ResidentItems items{int(count), tiles_n, int(each), resident ? tiles_n : 1};
    return launch(patch_embed_resident_kernel<Tile>, (count + each - 1) / each, Tile::kThreads,
                  Tile::kSharedBytes, stream, x, weight, make_epilogue<T>(p), items);
}

template <class T>
Error launch_hopper(const PatchEmbedParams& p, Stream stream) {
    // y is stored in 8 bytes, pos_embed read in 4.
    if (p.hidden_dim % 8 || reinterpret_cast<uintptr_t>(p.pos_embed) % 4)
        return cudaErrorNotSupported;
    const bool large = p.patches.num_patches * p.hidden_dim >= 100 * 128 * 256;
    if (p.patches.dtype == DType::kUInt8)
        return large ? launch_resident<T, 256, 4>(p, stream)
                     : launch_resident<T, 128, 8>(p, stream);
    auto run = [&]<Producer kProducer, int kN>() -> Error {
        using Tile = HopperGemmTile<T, 128, kN, 4, 2, kProducer>;
        const Patches& s = p.patches;
        const int64_t tiles = num_tiles<Tile>(s.num_patches, p.hidden_dim);
        CUtensorMap weight, rows;
        Error error = operand_map<typename Tile::B>(&weight, p.weight, p.dtype, p.hidden_dim,
                                                    s.patch_dim, p.weight_stride);
        if constexpr (kProducer == Producer::kTma) {
            if (!error)
                error = operand_map<typename Tile::A>(&rows, p.x, p.dtype, s.num_patches,
                                                      s.patch_dim, s.stride_image);
            if (error) return error;
            return launch_persistent<Tile>(patch_embed_rows_hopper_kernel<Tile>, tiles, stream,
                                           rows, weight, make_epilogue<T>(p), s.patch_dim);
        } else {
            if (error) return error;
            const PixelView<const T, T> x(static_cast<const T*>(p.x), s);
            return launch_persistent<Tile>(patch_embed_hopper_kernel<Tile>, tiles, stream, x,
                                           weight, make_epilogue<T>(p));
        }
    };
    auto with_producer = [&]<Producer kProducer>() {
        return large ? run.template operator()<kProducer, 256>()
                     : run.template operator()<kProducer, 128>();
    };
    return p.patches.rows ? with_producer.template operator()<Producer::kTma>()
                          : with_producer.template operator()<Producer::kThreads>();
}

template <class T>
Error launch_hopper(const PatchEmbedDxParams& p, Stream stream) {
    using Tile = HopperGemmTile<T, 128, 128, 4, 2, Producer::kTma, Major::kK, Major::kMN>;
    CUtensorMap dy, weight;
    const int64_t rows = p.patches.num_patches, patch_dim = p.patches.patch_dim;
    Error error =
        operand_map<typename Tile::A>(&dy, p.dy, p.dtype, rows, p.hidden_dim, p.hidden_dim);
    if (!error)
        error = operand_map<typename Tile::B>(&weight, p.weight, p.dtype, p.hidden_dim, patch_dim,
                                              p.weight_stride);
    if (error) return error;
    return with_view<T, true>(p.dx, p.patches, [&]<class View>(const View& dx) {
        return launch_persistent<Tile>(patch_embed_dx_hopper_kernel<Tile, View>,
                                       num_tiles<Tile>(rows, patch_dim), stream, dy, weight, dx,
                                       int(p.hidden_dim), p.scale);
    });
}

template <class T>
Error launch_hopper(const PatchEmbedDweightParams& p, Stream stream) {
    // 224 leave less of a tile idle than 256: for K 588, 768 and 1176, and the column of ones.
    using Tile = HopperGemmTile<T, 128, 224, 4, 2, Producer::kTma, Major::kMN, Major::kMN>;
    CUtensorMap dy, rows;
    const int64_t num_patches = p.patches.num_patches, width = p.patches.patch_dim + 1;
    const int64_t columns = (width + 7) / 8 * 8;
    if (!p.rows) return cudaErrorNotSupported;
    Error error =
        operand_map<typename Tile::A>(&dy, p.dy, p.dtype, num_patches, p.hidden_dim, p.hidden_dim);
    if (!error)
        error =
            operand_map<typename Tile::B>(&rows, p.rows, p.dtype, num_patches, columns, columns);
    if (error) return error;
    error = with_view<T, true>(p.x, p.patches, [&]<class View>(const View& x) {
        return launch(patch_embed_pixel_rows_kernel<View, T>,
                      grid_for(num_patches * columns / 64, 128), 128, 0, stream, x,
                      static_cast<T*>(p.rows), int(columns));
    });
    if (error) return error;
    return launch_persistent<Tile>(patch_embed_dweight_hopper_kernel<Tile>,
                                   num_tiles<Tile>(p.hidden_dim, width) * p.num_splits, stream, dy,
                                   rows, p.workspace, int(num_patches), int(p.hidden_dim),
                                   int(width), p.num_splits);
}

}  // namespace vlmkernels
