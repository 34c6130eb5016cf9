// Launchers: the codebook is prepared, then every block of tokens sees it.
#include "vq_lookup/vq_lookup.cuh"

namespace vlmkernels {

int64_t vq_lookup_workspace(int num_codes, int dim) { return VqPrepared::bytes(num_codes, dim); }

template <class Block, class T>
static Error launch_block(const VqLookupParams& p, const VqPrepared& prepared, Stream stream) {
    return launch(vq_lookup_kernel<Block, T>, (p.num_tokens + Block::kTokens - 1) / Block::kTokens,
                  Block::kThreads, Block::shared_bytes(prepared.num_chunks), stream, p, prepared);
}

template <class T>
static Error launch_typed(const VqLookupParams& p, Stream stream) {
    const VqPrepared prepared(p.workspace, p.num_codes, p.dim);
    const VqShape<T> codes{static_cast<const T*>(p.codebook), p.num_codes, p.dim, p.cosine};
    const Error error =
        launch(vq_prepare_kernel<T>, prepared.num_tiles, 256, p.dim * 4, stream, codes, prepared);
    if (error) return error;
    // What fits beside a second CTA on an H100; half as many tokens of a wide row.
    if (p.dim <= 256) return launch_block<VqBlock<2, 4>, T>(p, prepared, stream);
    return launch_block<VqBlock<1, 3>, T>(p, prepared, stream);
}

Error launch_vq_lookup(const VqLookupParams& p, Stream stream) {
    if (p.num_tokens == 0) return cudaSuccess;
    if (p.dtype == DType::kFloat32) return launch_typed<float>(p, stream);
    if (p.dtype == DType::kFloat16) return launch_typed<__half>(p, stream);
    return launch_typed<__nv_bfloat16>(p, stream);
}

}  // namespace vlmkernels
