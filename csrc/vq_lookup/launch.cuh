// Chooses blocks and launches: included by instances/*.cu, one element type each.
#pragma once

#include "vq_lookup/vq_lookup.cuh"
#include "vq_lookup/vq_lookup_hopper.cuh"

namespace vlmkernels {

template <class Block, class T>
Error launch_block(void (*kernel)(VqLookupParams, VqCodebook<T>, VqPrepared),
                   const VqLookupParams& p, const VqCodebook<T>& codebook,
                   const VqPrepared& prepared, Stream stream) {
    return launch(kernel, (p.num_tokens + Block::kTokens - 1) / Block::kTokens, Block::kThreads,
                  Block::shared_bytes(prepared.num_chunks), stream, p, codebook, prepared);
}

// Whether all rows of the tensors start at 16 bytes and have a multiple of 8 elements.
inline bool has_vectors(const VqLookupParams& p) {
    const auto bits = reinterpret_cast<uintptr_t>(p.z) | reinterpret_cast<uintptr_t>(p.codebook) |
                      reinterpret_cast<uintptr_t>(p.quantized);
    return bits % 16 == 0 && p.dim % 8 == 0;
}

template <class T>
Error launch(const VqLookupParams& p, Stream stream) {
    const VqPrepared prepared(p.workspace, p.num_codes, p.dim);
    const VqCodebook<T> codebook{static_cast<const T*>(p.codebook), p.num_codes, p.dim, p.cosine,
                                 has_vectors(p)};
    const Error error =
        launch(vq_prepare_kernel<T>, prepared.num_tiles, VqPrepared::kTileCodes * VqGroup::kLanes,
               p.dim * 4, stream, codebook, prepared);
    if (error) return error;
    // As many tokens as shared memory holds.
    auto hopper = [&]<class Block>() {
        return launch_block<Block>(vq_lookup_hopper_kernel<Block, T>, p, codebook, prepared,
                                   stream);
    };
    auto other = [&]<class Block>() {
        return launch_block<Block>(vq_lookup_kernel<Block, T>, p, codebook, prepared, stream);
    };
    if (has_hopper()) {
        // Narrow rows: comparing takes as long as multiplying, and more warps hide its latency.
        if (p.dim <= 128) return hopper.template operator()<VqHopperBlock<1, 4, 128>>();
        if (p.dim <= 256) return hopper.template operator()<VqHopperBlock<2, 2, 256>>();
        if (p.dim <= 512) return hopper.template operator()<VqHopperBlock<1, 2, 512>>();
        return hopper.template operator()<VqHopperBlock<1, 1, 1024>>();
    }
    auto fits = [&]<class Block>() {
        return p.dim <= Block::kMostDim &&
               Block::shared_bytes(prepared.num_chunks) <= shared_bytes_per_cta();
    };
    using Many = VqBlock<2, 4, 256>;
    using Few = VqBlock<1, 2, 1024>;
    if (fits.template operator()<Many>()) return other.template operator()<Many>();
    return fits.template operator()<Few>() ? other.template operator()<Few>()
                                           : other.template operator()<VqBlock<1, 1, 1024>>();
}

}  // namespace vlmkernels
