// Patch by patch, line by line: pixels become rows, which PyTorch's own product then multiplies.
#include "common/cpu.h"
#include "patch_embed/patch_embed.h"

namespace vlmkernels {
namespace {

// Where a patch begins in x, and how far its channels and lines lie apart.
struct Place {
    int64_t offset, stride_channel, stride_h;
};

Place place(const Patches& p, int64_t patch, const PackedImage* image) {
    Place found{0, p.stride_channel, p.stride_h};
    int64_t grid_h = p.grid_h, grid_w = p.grid_w;
    if (image) {
        grid_h = image->grid_h, grid_w = image->grid_w;
        found.stride_h = grid_w * p.patch_w;
        found.stride_channel = grid_h * p.patch_h * found.stride_h;
        found.offset = int64_t(image->first_patch) * p.patch_dim;
        patch -= image->first_patch;
    } else {
        const int64_t frame = patch / (grid_h * grid_w);
        patch -= frame * grid_h * grid_w;
        found.offset =
            frame / p.grid_t * p.stride_image + frame % p.grid_t * p.patch_t * p.stride_t;
    }
    const int64_t m = p.merge, block = patch / (m * m), within = patch % (m * m);
    const int64_t blocks = grid_w / m;
    const int64_t h = block / blocks * m + within / m, w = block % blocks * m + within % m;
    found.offset += h * p.patch_h * found.stride_h + w * p.patch_w;
    return found;
}

// 256 values of a channel: what each byte becomes.
template <class T>
void fill_table(const PatchRowsParams& p, int channel, T (&table)[256]) {
    for (int byte = 0; byte < 256; ++byte)
        table[byte] =
            from_float<T>(float(byte) * p.affine.scale[channel] + p.affine.shift[channel]);
}

template <class T, class Source>
void convert_line(const PatchRowsParams& p, const Source* from, T* to, int n, int channel,
                  const T (&table)[256]) {
    if constexpr (sizeof(T) == 2 && sizeof(Source) == 1) {
        for (int i = 0; i < n; ++i) to[i] = table[from[i]];
    } else {
        const float scale = p.affine.scale[channel], shift = p.affine.shift[channel];
        for (int i = 0; i < n; ++i) {
            if constexpr (sizeof(Source) == 1)
                to[i] = from_float<T>(float(from[i]) * scale + shift);
            else
                to[i] = from_float<T>(to_float(from[i]) * scale + shift);
        }
    }
}

template <class T, class Source>
void fill_rows(const PatchRowsParams& p, int64_t begin, int64_t end) {
    const Patches& s = p.patches;
    const auto* x = static_cast<const Source*>(p.x);
    const int plane = s.patch_dim / p.channels;  // columns of one channel of affine
    T table[256];
    // Channel by channel of all these patches: each needs its table once.
    for (int c = 0; c < p.channels; ++c) {
        if constexpr (sizeof(T) == 2 && sizeof(Source) == 1) fill_table(p, c, table);
        const PackedImage* image = s.images;
        for (int64_t patch = begin; patch < end; ++patch) {
            if (image)
                while (image + 1 < s.images + s.num_images && image[1].first_patch <= patch)
                    ++image;
            const Place at = place(s, patch, image);
            T* to = static_cast<T*>(p.rows) + patch * s.patch_dim + c * plane;
            auto line = [&](const Source* from, int n) {
                if (p.normalise)
                    convert_line(p, from, to, n, c, table);
                else
                    std::memcpy(to, from, n * sizeof(T));  // of the same type
                to += n;
            };
            if (s.rows) {
                line(x + at.offset + c * plane, plane);
                continue;
            }
            for (int t = 0; t < s.patch_t; ++t)
                for (int h = 0; h < s.patch_h; ++h)
                    line(x + at.offset + c * at.stride_channel + t * s.stride_t + h * at.stride_h,
                         s.patch_w);
        }
    }
}

}  // namespace

template <class Isa>
void patch_embed_rows_cpu(const PatchRowsParams& p) {
    // Few enough patches at once that their lines stay in the cache from channel to channel.
    parallel_for(p.patches.num_patches, 32, [&](int64_t begin, int64_t end) {
        for (; begin < end; begin += 32) {
            const int64_t last = begin + 32 < end ? begin + 32 : end;
            dispatch_float(p.dtype, [&]<class T>() {
                if (p.patches.dtype == DType::kUInt8)
                    fill_rows<T, uint8_t>(p, begin, last);
                else
                    fill_rows<T, T>(p, begin, last);
            });
        }
    });
}

template void patch_embed_rows_cpu<VLMKERNELS_ISA>(const PatchRowsParams&);

}  // namespace vlmkernels
