// sin and cos of a float angle to about one unit in the last place, for |angle| < 2^31: without
// branches or local memory, so that nvcc and a vectorising host compiler take the same code.
#pragma once

#ifdef __CUDACC__
#define VLMKERNELS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define VLMKERNELS_HOST_DEVICE inline
#endif

namespace vlmkernels {
namespace {

VLMKERNELS_HOST_DEVICE void sin_cos(float angle, float& sine, float& cosine) {
    // angle = n pi/2 + r. pi/2 is split so that the first two products are exact for |n| < 2^31.
    constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
    const double a = angle;
    const double n = (a * 0.63661977236758134308 + kRound) - kRound;
    const double reduced =
        ((a - n * 0x1.921fb0p+0) - n * 0x1.5110b0p-22) - n * 0x1.18469898cc517p-44;
    const float r = float(reduced), z = r * r;
    // Minimax polynomials on [-pi/4, pi/4] (Cephes sinf, cosf).
    const float s = r + r * z * ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f);
    const float c =
        1.0f - 0.5f * z +
        z * z * ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f);
    const int quadrant = int(n);
    const float s_swapped = quadrant & 1 ? c : s, c_swapped = quadrant & 1 ? s : c;
    sine = quadrant & 2 ? -s_swapped : s_swapped;
    cosine = (quadrant + 1) & 2 ? -c_swapped : c_swapped;
}

}  // namespace
}  // namespace vlmkernels
