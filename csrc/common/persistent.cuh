// Launches of kernels whose CTAs take tiles in turn (gemm_hopper.cuh): a CTA for each SM.
#pragma once

#include <algorithm>

#include "common/launch.cuh"

namespace vlmkernels {

template <class Tile, class... Args>
Error launch_persistent(void (*kernel)(Args...), int64_t tiles, Stream stream,
                        const std::type_identity_t<Args>&... args) {
    return launch(kernel, std::min<int64_t>(tiles, num_sms()), Tile::kThreads, Tile::kSharedBytes,
                  stream, args...);
}

}  // namespace vlmkernels
