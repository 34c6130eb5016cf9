// Launchers: the codebook is prepared, then every block of tokens sees it.
#include "vq_lookup/vq_lookup.cuh"

namespace vlmkernels {

int64_t vq_lookup_workspace(int num_codes, int dim) { return VqPrepared::bytes(num_codes, dim); }

template <class Block, class T>
static Error launch_block(const VqLookupParams& p, const VqCodebook<T>& codebook,
                          const VqPrepared& prepared, Stream stream) {
    return launch(vq_lookup_kernel<Block, T>, (p.num_tokens + Block::kTokens - 1) / Block::kTokens,
                  Block::kThreads, Block::shared_bytes(prepared.num_chunks), stream, p, codebook,
                  prepared);
}

// Whether all rows of the tensors start at 16 bytes.
static bool has_vectors(const VqLookupParams& p) {
    const auto bits = reinterpret_cast<uintptr_t>(p.z) | reinterpret_cast<uintptr_t>(p.codebook) |
                      reinterpret_cast<uintptr_t>(p.quantized);
    return (bits | uintptr_t(p.dim) * size_of(p.dtype)) % 16 == 0;
}

template <class T>
static Error launch_typed(const VqLookupParams& p, Stream stream) {
    const VqPrepared prepared(p.workspace, p.num_codes, p.dim);
    const VqCodebook<T> codebook{static_cast<const T*>(p.codebook), p.num_codes, p.dim, p.cosine,
                                 has_vectors(p)};
    const Error error =
        launch(vq_prepare_kernel<T>, prepared.num_tiles, VqPrepared::kTileCodes * VqGroup::kLanes,
               p.dim * 4, stream, codebook, prepared);
    if (error) return error;
    // Two CTAs on an SM of an H100; with wide rows one, of half as many tokens.
    if (p.dim <= 256) return launch_block<VqBlock<2, 256, 4>>(p, codebook, prepared, stream);
    return launch_block<VqBlock<1, 1024, 3>>(p, codebook, prepared, stream);
}

Error launch_vq_lookup(const VqLookupParams& p, Stream stream) {
    if (p.num_tokens == 0) return cudaSuccess;
    if (p.dtype == DType::kFloat32) return launch_typed<float>(p, stream);
    if (p.dtype == DType::kFloat16) return launch_typed<__half>(p, stream);
    return launch_typed<__nv_bfloat16>(p, stream);
}

}  // namespace vlmkernels
