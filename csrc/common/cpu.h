// Small tools of the CPU kernels: 16-bit floats, dtype dispatch, parallel loops.
// Everything is in an unnamed namespace on purpose (see isa.h).
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "common/dtype.h"
#include "common/isa.h"

namespace vlmkernels {
namespace {

struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}
// Halves are converted by integer and float arithmetic, which vectorises where _Float16 does not.
inline float to_float(Half x) {
    const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
    float y;
    std::memcpy(&y, &magnitude, 4);
    y *= 0x1p112f;  // moves the exponent; makes subnormals normal
    uint32_t bits;
    std::memcpy(&bits, &y, 4);
    bits = (x.bits & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000 : bits;
    bits |= uint32_t(x.bits & 0x8000) << 16;
    std::memcpy(&y, &bits, 4);
    return y;
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
    return x;
}
template <>
inline BFloat16 from_float<BFloat16>(float x) {  // round to nearest even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return {uint16_t(x == x ? rounded : 0x7fc0)};
}
// Round to nearest even, from github.com/Maratyszcza/FP16 (MIT): adding a power of two that depends
// on the exponent rounds the mantissa to its ten bits.
template <>
inline Half from_float<Half>(float x) {
    uint32_t bits, magnitude;
    std::memcpy(&bits, &x, 4);
    magnitude = bits & 0x7fffffff;
    float y;
    std::memcpy(&y, &magnitude, 4);
    y = y * 0x1p112f * 0x1p-110f;  // too large becomes infinite
    uint32_t exponent = bits * 2 & 0xff000000;
    exponent = (exponent < 0x71000000 ? 0x71000000 : exponent) / 2 + 0x07800000;
    float rounder;
    std::memcpy(&rounder, &exponent, 4);
    y += rounder;
    uint32_t rounded;
    std::memcpy(&rounded, &y, 4);
    rounded = (rounded >> 13 & 0x7c00) + (rounded & 0xfff);
    return {uint16_t((bits >> 16 & 0x8000) | (magnitude > 0x7f800000 ? 0x7e00 : rounded))};
}

// Calls f.template operator()<T>() with the element type of a floating dtype.
template <class F>
void dispatch_float(DType dtype, F&& f) {
    if (dtype == DType::kFloat32) return f.template operator()<float>();
    if (dtype == DType::kFloat16) return f.template operator()<Half>();
    if (dtype == DType::kBFloat16) return f.template operator()<BFloat16>();
}

inline int64_t max_threads() {
#ifdef _OPENMP
    return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
    return 1;
#endif
}

// Runs f(begin, end) over [0, n) on all threads, in chunks of at least `grain`.
template <class F>
void parallel_for(int64_t n, int64_t grain, F&& f) {
#ifdef _OPENMP
    int64_t threads = max_threads(), useful = (n + grain - 1) / grain;
    if (useful < threads) threads = useful;
    if (threads > 1) {
#pragma omp parallel num_threads(int(threads))
        {
            int64_t count = omp_get_num_threads(), id = omp_get_thread_num();
            int64_t begin = n * id / count, end = n * (id + 1) / count;
            if (begin < end) f(begin, end);
        }
        return;
    }
#endif
    if (n > 0) f(int64_t(0), n);
}

// For items of uneven cost: runs f(take) once on each thread, on at most n / grain of them; take()
// gives the next item of [0, n), in order, and -1 when all are taken.
template <class F>
void parallel_take(int64_t n, int64_t grain, F&& f) {
    std::atomic<int64_t> next{0};
    auto take = [&] {
        int64_t item = next.fetch_add(1, std::memory_order_relaxed);
        return item < n ? item : -1;
    };
    parallel_for(n, grain, [&](int64_t, int64_t) { f(take); });
}

}  // namespace
}  // namespace vlmkernels
