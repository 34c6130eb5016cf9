// Pixels as the matrix of their patches: bytes or 16-bit elements, of images of one size or of
// packed images of different sizes, patches in raster order or in blocks of merge x merge
// (Qwen2-VL: the patches that the projector joins are neighbours).
#pragma once

#include "patch_embed/patches.cuh"

namespace vlmkernels {

// Where a patch begins, and how far its pixels lie apart.
struct PixelRow {
    int64_t offset;
    int stride_channel, stride_t, stride_h;
};
// A pixel within a patch.
struct PixelColumn {
    int channel, t, h, w;
};
__device__ inline int64_t operator+(const PixelRow& row, const PixelColumn& column) {
    return row.offset + (int64_t(column.channel) * row.stride_channel + column.t * row.stride_t +
                         column.h * row.stride_h + column.w);
}

// Source: of the pixels. Target: what they are multiplied as.
template <class Source, class Target>
struct PixelView {
    using T = Source;
    static constexpr bool kAffine = false;
    T* data;
    int num_rows, num_columns;
    int run_bytes;  // as Target
    FastDivide patch_w, patch_h, patch_t;
    FastDivide merge, blocks_w, blocks_h, grid_t;  // of images of one size
    int64_t step_image, step_t;
    int step_h, step_w, frames;  // lines, pixels and frames of a patch
    PixelRow strides;            // of images of one size
    const PackedImage* images;   // packed
    int num_images, merged, patch_dim;

    PixelView(T* data, const Patches& p)
        : data(data),
          num_rows(int(p.num_patches)),
          num_columns(p.patch_dim),
          run_bytes(alignment(data, p)),
          patch_w(p.patch_w),
          patch_h(p.patch_h),
          patch_t(p.patch_t),
          merge(p.merge),
          blocks_w(p.images ? 1 : p.grid_w / p.merge),
          blocks_h(p.images ? 1 : p.grid_h / p.merge),
          grid_t(p.grid_t),
          step_image(p.stride_image),
          step_t(p.stride_t * p.patch_t),
          step_h(p.patch_h),
          step_w(p.patch_w),
          frames(p.patch_t),
          strides{0, int(p.stride_channel), int(p.stride_t), int(p.stride_h)},
          images(p.images),
          num_images(p.num_images),
          merged(p.merge),
          patch_dim(p.patch_dim) {}

    __device__ PixelRow row(uint32_t patch) const {
        PixelRow found = strides;
        uint32_t blocks = 0;
        if (images) {
            const PackedImage image = image_of(patch);
            patch -= image.first_patch;
            blocks = image.grid_w / merged;
            found.offset = int64_t(image.first_patch) * patch_dim;
            found.stride_h = image.grid_w * step_w;
            found.stride_channel = image.grid_h * step_h * found.stride_h;
        }
        uint32_t h = merge(patch);  // patch is now the column in the block
        uint32_t w = merge(h);
        uint32_t block_h = images ? w / blocks : blocks_w(w);
        if (images) {
            w -= block_h * blocks;
        } else {
            uint32_t t = blocks_h(block_h);
            const uint32_t image = grid_t(t);
            found.offset = image * step_image + t * step_t;
        }
        h += block_h * merged;
        found.offset += int64_t(h) * step_h * found.stride_h + (w * merged + patch) * step_w;
        return found;
    }
    __device__ PixelColumn column(uint32_t column) const {
        uint32_t h = patch_w(column);  // column is now the one in the line
        uint32_t t = patch_h(h);
        const uint32_t channel = patch_t(t);
        return {int(channel), int(t), int(h), int(column)};
    }

  private:
    __device__ PackedImage image_of(uint32_t patch) const {
        int first = 0, last = num_images - 1;
        while (first < last) {
            const int middle = (first + last + 1) / 2;
            if (uint32_t(images[middle].first_patch) <= patch)
                first = middle;
            else
                last = middle - 1;
        }
        const int4 image = *reinterpret_cast<const int4*>(images + first);
        return {image.x, image.y, image.z, image.w};
    }
    // The largest run, in bytes of Target, that lies together in every line and begins aligned.
    static int alignment(const void* data, const Patches& p) {
        uint64_t bits = reinterpret_cast<uintptr_t>(data) | 8 * sizeof(T);
        bits |= uint64_t(p.patch_w) * sizeof(T);
        if (!p.images)
            for (int64_t stride : {p.stride_image, p.stride_channel, p.stride_t, p.stride_h})
                bits |= uint64_t(stride) * sizeof(T);
        return int((bits & -bits) * (sizeof(Target) / sizeof(T)));
    }
};

// Four signed bytes as elements, exact in 16 bits. Of a byte u, u ^ 0x80 is the signed u - 128.
__device__ inline void from_signed_bytes(uint32_t bytes, uint32_t& low, uint32_t& high, __half) {
    // 0x6400 + u is 1024 + u.
    bytes ^= 0x80808080;
    const uint32_t a = __byte_perm(bytes, 0x64646464, 0x4140),
                   b = __byte_perm(bytes, 0x64646464, 0x4342);
    const __half2 offset = __float2half2_rn(1152.f);
    reinterpret_cast<__half2&>(low) = __hsub2(reinterpret_cast<const __half2&>(a), offset);
    reinterpret_cast<__half2&>(high) = __hsub2(reinterpret_cast<const __half2&>(b), offset);
}
__device__ inline void from_signed_bytes(uint32_t bytes, uint32_t& low, uint32_t& high,
                                         __nv_bfloat16) {
    // 0x4300 + the low seven bits is 128 + them; subtract 256 if the sign is set, else 128. Both
    // from one permutation by a single logical instruction each.
    auto element = [&](uint32_t selector) {
        const uint32_t a = __byte_perm(bytes, 0x43434343, selector), b = a & 0xff7fff7f;
        uint32_t offset;  // a & 0xff00ff00 | a & ~b
        asm("lop3.b32 %0, %1, %2, 0xff00ff00, 0xb0;\n" : "=r"(offset) : "r"(a), "r"(b));
        __nv_bfloat162 c = __hsub2(reinterpret_cast<const __nv_bfloat162&>(b),
                                   reinterpret_cast<const __nv_bfloat162&>(offset));
        return reinterpret_cast<const uint32_t&>(c);
    };
    low = element(0x4140);
    high = element(0x4342);
}
__device__ inline void centre_bytes(uint32_t bytes, uint32_t& low, uint32_t& high, auto target) {
    from_signed_bytes(bytes ^ 0x80808080, low, high, target);
}

// As load_chunk of common/gemm.cuh.
template <int kRunBytes, class Target>
__device__ void load_chunk(const PixelView<const Target, Target>& view, uint32_t shared,
                           const PixelRow& row, const PixelColumn (&columns)[16 / kRunBytes],
                           const bool (&valid)[16 / kRunBytes]) {
    int offsets[16 / kRunBytes];
#pragma unroll
    for (int i = 0; i < 16 / kRunBytes; ++i) offsets[i] = int(row + columns[i] - row.offset);
    load_chunk<kRunBytes>(shared, view.data + row.offset, offsets, valid);
}

// A chunk of 8 bytes, read in runs of kRunBytes / 2, as 8 elements of Target.
template <int kRunBytes, class Target>
__device__ void load_chunk(const PixelView<const uint8_t, Target>& view, uint32_t shared,
                           const PixelRow& row, const PixelColumn (&columns)[16 / kRunBytes],
                           const bool (&valid)[16 / kRunBytes]) {
    constexpr int kBytes = kRunBytes / 2;
    uint64_t bytes = 0x8080808080808080;  // zeros, once centred
#pragma unroll
    for (int i = 0; i < 8 / kBytes; ++i) {
        if (!valid[i]) continue;
        const uint8_t* from = view.data + (row + columns[i]);
        if constexpr (kBytes == 8) {
            bytes = *reinterpret_cast<const uint64_t*>(from);
        } else {
            using Run = std::conditional_t<kBytes == 4, uint32_t,
                                           std::conditional_t<kBytes == 2, uint16_t, uint8_t>>;
            const uint64_t mask = ((uint64_t(1) << kBytes * 8) - 1) << i * kBytes * 8;
            bytes = (bytes & ~mask) | uint64_t(*reinterpret_cast<const Run*>(from))
                                          << i * kBytes * 8;
        }
    }
    uint32_t elements[4];
    centre_bytes(uint32_t(bytes), elements[0], elements[1], Target());
    centre_bytes(uint32_t(bytes >> 32), elements[2], elements[3], Target());
    store_shared(shared, elements);
}

}  // namespace vlmkernels
