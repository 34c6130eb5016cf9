// Blocks of columns of a row, some vectors at a time, in fp32.
#include "common/vecs.h"

namespace vlmkernels {
namespace {

VLMKERNELS_INLINE Vec magnitude(Vec x) { return (Vec)((Bits)x & 0x7fffffff); }
VLMKERNELS_INLINE Vec positive_part(Vec x) { return max(Vec{}, x); }
VLMKERNELS_INLINE Vec if_negative(Vec x, Vec a, Vec b) { return x < 0.0f ? a : b; }
VLMKERNELS_INLINE Vecs magnitude(const Vecs& x) {
    return each_part([](Vec x) VLMKERNELS_INLINED { return magnitude(x); }, x);
}
VLMKERNELS_INLINE Vecs positive_part(const Vecs& x) {
    return each_part([](Vec x) VLMKERNELS_INLINED { return positive_part(x); }, x);
}
VLMKERNELS_INLINE Vecs reciprocal(const Vecs& x) {
    return each_part([](Vec x) VLMKERNELS_INLINED { return reciprocal(x); }, x);
}
VLMKERNELS_INLINE Vecs if_negative(const Vecs& x, const Vecs& a, const Vecs& b) {
    return each_part([](Vec x, Vec a, Vec b) VLMKERNELS_INLINED { return if_negative(x, a, b); }, x,
                     a, b);
}

}  // namespace
}  // namespace vlmkernels

#include "activation/gate.h"  // needs those above

namespace vlmkernels {
namespace {

constexpr int64_t kBlock = 1024;  // columns

// f(row, column, count) over blocks of columns, on all threads.
template <class F>
void for_each_block(int64_t num_rows, int64_t dim, F&& f) {
    const int64_t blocks = (dim + kBlock - 1) / kBlock;
    parallel_for(num_rows * blocks, 16, [&](int64_t begin, int64_t end) {
        int64_t row = begin / blocks, column = begin % blocks * kBlock;
        for (int64_t i = begin; i < end; ++i) {
            f(row, column, dim - column < kBlock ? dim - column : kBlock);
            column += kBlock;
            if (column >= dim) {
                ++row;
                column = 0;
            }
        }
    });
}

template <class V, class T>
VLMKERNELS_INLINE V load_as(const T* p, int count) {
    if constexpr (sizeof(V) == sizeof(Vecs))
        return load_vecs(p);
    else
        return load_first(p, count);
}
template <class T>
VLMKERNELS_INLINE void store_first(T* p, const Vecs& x, int64_t) {
    store(p, x);
}

// f.operator()<V>(i, count) over [0, n): Vecs as far as they go, then Vec.
template <class F>
VLMKERNELS_INLINE void for_each_vecs(int64_t n, F&& f) {
    int64_t i = 0;
    for (; i + Vecs::kSize <= n; i += Vecs::kSize) f.template operator()<Vecs>(i, Vecs::kSize);
    for_each_vector(i, n, [&](int64_t j, int count) VLMKERNELS_INLINED {
        f.template operator()<Vec>(j, count);
    });
}

template <class V, Activation kind, bool kGated, class T>
VLMKERNELS_INLINE void forward(const T* x, const T* up, T* y, int n) {
    const V value = activate<kind>(load_as<V>(x, n));
    if constexpr (kGated)
        store_first(y, value * load_as<V>(up, n), n);
    else
        store_first(y, value, n);
}

template <class V, Activation kind, bool kGated, class T>
VLMKERNELS_INLINE void backward(const T* dy, const T* x, const T* up, T* dx, T* dup, int n) {
    const V value = load_as<V>(x, n), g = load_as<V>(dy, n);
    V s, slope;
    gate<kind>(value, s, slope);
    const V along = g * (s + value * slope);
    if constexpr (kGated) {
        store_first(dx, along * load_as<V>(up, n), n);
        store_first(dup, g * value * s, n);
    } else {
        store_first(dx, along, n);
    }
}

// Calls f.template operator()<T, kind, gated>().
template <class F>
void dispatch(DType dtype, Activation kind, bool gated, F&& f) {
    dispatch_float(dtype, [&]<class T>() {
        dispatch_activation(kind, [&]<Activation k>() {
            gated ? f.template operator()<T, k, true>() : f.template operator()<T, k, false>();
        });
    });
}

template <class T>
T* at(void* pointer, int64_t i) {
    return pointer ? static_cast<T*>(pointer) + i : nullptr;
}
template <class T>
const T* at(const void* pointer, int64_t i) {
    return pointer ? static_cast<const T*>(pointer) + i : nullptr;
}

}  // namespace

template <class Isa>
void activation_cpu(const ActivationParams& p) {
    dispatch(p.dtype, p.kind, p.up, [&]<class T, Activation kind, bool kGated>() {
        for_each_block(p.num_rows, p.dim, [&](int64_t row, int64_t column, int64_t n) {
            const T* x = at<T>(p.x, row * p.x_stride + column);
            const T* up = at<T>(p.up, row * p.up_stride + column);
            T* y = at<T>(p.y, row * p.dim + column);
            for_each_vecs(n, [&]<class V>(int64_t i, int count) VLMKERNELS_INLINED {
                forward<V, kind, kGated>(x + i, up + i, y + i, count);
            });
        });
    });
}

template <class Isa>
void activation_backward_cpu(const ActivationBackwardParams& p) {
    dispatch(p.dtype, p.kind, p.up, [&]<class T, Activation kind, bool kGated>() {
        for_each_block(p.num_rows, p.dim, [&](int64_t row, int64_t column, int64_t n) {
            const T* dy = at<T>(p.dy, row * p.dim + column);
            const T* x = at<T>(p.x, row * p.x_stride + column);
            const T* up = at<T>(p.up, row * p.up_stride + column);
            T* dx = at<T>(p.dx, row * p.dx_stride + column);
            T* dup = at<T>(p.dup, row * p.dup_stride + column);
            for_each_vecs(n, [&]<class V>(int64_t i, int count) VLMKERNELS_INLINED {
                backward<V, kind, kGated>(dy + i, x + i, up + i, dx + i, dup + i, count);
            });
        });
    });
}

template void activation_cpu<VLMKERNELS_ISA>(const ActivationParams& p);
template void activation_backward_cpu<VLMKERNELS_ISA>(const ActivationBackwardParams& p);

}  // namespace vlmkernels
